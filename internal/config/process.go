package config

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// Process are the settings of the process, as opposed to those of a tunnel.
type Process struct {
	// RuntimeDir is the folder of the control sockets.
	RuntimeDir string
	// Sandbox is off, on or strict.
	Sandbox string
	// LogLevel is debug, info, warn or error; LogFormat is text or json.
	LogLevel, LogFormat string
	// Threads is the number of threads that send, and of those that receive; 0 is auto.
	Threads int
	// MetricsAddress is where metrics are served, an address and a port or unix: and a path; "" is nowhere.
	MetricsAddress string
	// MetricsRemotes is how many remotes of a tunnel with many have series of their own.
	MetricsRemotes int
	// ManageSysctls sets, and sets back, what real servers need of the host.
	ManageSysctls bool
}

// DefaultProcess returns the settings of a process that sets none.
func DefaultProcess() Process {
	return Process{RuntimeDir: "/run/ipipd", Sandbox: "on", LogLevel: "info", LogFormat: "text"}
}

// ProcessProperty is to Process what tunnel.Property is to tunnel.Config: the flags of `up`, the
// keys of a file and their errors, the JSON Schema and docs/flags.md come from ProcessProperties.
type ProcessProperty struct {
	// Name, Values, Default, Help and Words are as in tunnel.Property.
	Name, Values, Default, Help string
	Words                       []string

	get func(*Process) string
	// set returns "", or a description of the accepted values.
	set func(*Process, string) (want string)
}

// Set parses value into p. Its error is a *tunnel.ValueError.
func (f ProcessProperty) Set(p *Process, value string) error {
	if want := f.set(p, value); want != "" {
		return &tunnel.ValueError{Property: f.Name, Value: value, Want: want}
	}
	return nil
}

// Get returns p's value in the notation that Set takes.
func (f ProcessProperty) Get(p *Process) string { return f.get(p) }

// ProcessProperties returns all properties of the process in display order.
func ProcessProperties() []ProcessProperty { return slices.Clone(processProperties) }

// maxMetricsRemotes bounds a scrape: one such tunnel makes it as large as 1,000 tunnels with one remote do.
const maxMetricsRemotes = 10_000

// RuntimeDir is the folder of the control sockets: every command that connects to one has this property.
var RuntimeDir = ProcessProperty{
	Name: "runtime-dir", Values: "folder", Default: "/run/ipipd",
	Help: "where the control socket is, mode 0600; made with mode 0700 if it is missing, refused if somebody else can write it",
	get:  func(p *Process) string { return p.RuntimeDir },
	set: func(p *Process, v string) string {
		p.RuntimeDir = v
		if v == "" || len(v) > control.MaxDir || strings.ContainsRune(v, 0) {
			return fmt.Sprintf("a folder, with a path of 1 to %d bytes", control.MaxDir)
		}
		return ""
	},
}

var processProperties = []ProcessProperty{
	RuntimeDir,
	{
		Name: "threads", Values: "`auto` or 1..16", Default: "auto",
		Help:  "threads that send, and as many that receive, whatever the number of tunnels; several receive only from the link layer, and share the flows; auto is one for two processors, up to 4",
		Words: []string{"auto"},
		get: func(p *Process) string {
			if p.Threads == 0 {
				return "auto"
			}
			return strconv.Itoa(p.Threads)
		},
		set: func(p *Process, v string) string {
			p.Threads = 0
			if v == "auto" {
				return ""
			}
			n, err := strconv.ParseUint(v, 10, 8)
			if err != nil || n < 1 || n > tunnel.MaxThreads {
				return fmt.Sprintf("auto or 1..%d", tunnel.MaxThreads)
			}
			p.Threads = int(n)
			return ""
		},
	},
	metricsAddress,
	{
		Name: "metrics-remotes", Values: "0..10000", Default: "0",
		Help: "how many remotes of a tunnel with `remote-address any` have metrics of their own, those that are not ok first; four series each",
		get:  func(p *Process) string { return strconv.Itoa(p.MetricsRemotes) },
		set: func(p *Process, v string) string {
			n, err := strconv.ParseUint(v, 10, 16)
			if err != nil || n > maxMetricsRemotes {
				return fmt.Sprintf("0..%d", maxMetricsRemotes)
			}
			p.MetricsRemotes = int(n)
			return ""
		},
	},
	{
		Name: "manage-sysctls", Values: "`yes` or `no`", Default: "no",
		Help:  "set the rp_filter, arp_ignore and arp_announce that the real server of a load balancer needs, and set them back at the end; without a value it is yes",
		Words: []string{"yes", "no"},
		get: func(p *Process) string {
			if p.ManageSysctls {
				return "yes"
			}
			return "no"
		},
		set: func(p *Process, v string) (want string) {
			p.ManageSysctls = v == "yes"
			return oneOf(new(string), v, "yes", "no")
		},
	},
	{
		Name: "sandbox", Values: "`off`, `on` or `strict`", Default: "on",
		Help:  "have the process make no system call (seccomp) and open no file (Landlock) that it has no use for, once it has begun; strict ends it where on refuses a call",
		Words: []string{"off", "on", "strict"},
		get:   func(p *Process) string { return p.Sandbox },
		set:   func(p *Process, v string) string { return oneOf(&p.Sandbox, v, "off", "on", "strict") },
	},
	{
		Name: "log-level", Values: "`debug`, `info`, `warn` or `error`", Default: "info",
		Help:  "the least important messages that are logged",
		Words: []string{"debug", "info", "warn", "error"},
		get:   func(p *Process) string { return p.LogLevel },
		set:   func(p *Process, v string) string { return oneOf(&p.LogLevel, v, "debug", "info", "warn", "error") },
	},
	{
		Name: "log-format", Values: "`text` or `json`", Default: "text",
		Help:  "how messages are written to standard error",
		Words: []string{"text", "json"},
		get:   func(p *Process) string { return p.LogFormat },
		set:   func(p *Process, v string) string { return oneOf(&p.LogFormat, v, "text", "json") },
	},
}

// oneOf sets *to to v if it is one of words, or else returns their list.
func oneOf(to *string, v string, words ...string) (want string) {
	if !slices.Contains(words, v) {
		last := len(words) - 1
		return strings.Join(words[:last], ", ") + " or " + words[last]
	}
	*to = v
	return ""
}

package main

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// acceptedAnnotation is the annotation of a flag with the values it accepts, for flagError.
const acceptedAnnotation = "accepted"

// processOptions are the options of the process, as opposed to those of a tunnel.
type processOptions struct {
	RuntimeDir string
	LogLevel   slog.Level
	LogFormat  string
	Threads    int // 0 is auto
}

func defaultProcessOptions() processOptions {
	return processOptions{RuntimeDir: "/run/ipipd", LogLevel: slog.LevelInfo, LogFormat: "text"}
}

// processFlag is to processOptions what tunnel.Property is to tunnel.Config.
type processFlag struct {
	name, values, def, help string
	words                   []string
	get                     func(*processOptions) string
	// set returns "", or the values it accepts.
	set func(*processOptions, string) (want string)
}

var runtimeDirFlag = processFlag{
	name: "runtime-dir", values: "folder", def: "/run/ipipd",
	help: "where the control socket is, mode 0600; made with mode 0700 if it is missing, refused if somebody else can write it",
	get:  func(o *processOptions) string { return o.RuntimeDir },
	set: func(o *processOptions, v string) string {
		o.RuntimeDir = v
		if v == "" || len(v) > control.MaxDir || strings.ContainsRune(v, 0) {
			return fmt.Sprintf("a folder, with a path of 1 to %d bytes", control.MaxDir)
		}
		return ""
	},
}

// processFlags are the flags of `up` in addition to the tunnel's properties.
var processFlags = []processFlag{
	runtimeDirFlag,
	{
		name: "threads", values: "`auto` or 1..16", def: "auto",
		help:  "threads that send, and as many that receive, whatever the number of tunnels; several receive only from the link layer, and share the flows; auto is one for two processors, up to 4",
		words: []string{"auto"},
		get: func(o *processOptions) string {
			if o.Threads == 0 {
				return "auto"
			}
			return strconv.Itoa(o.Threads)
		},
		set: func(o *processOptions, v string) string {
			o.Threads = 0
			if v == "auto" {
				return ""
			}
			n, err := strconv.ParseUint(v, 10, 8)
			if err != nil || n < 1 || n > tunnel.MaxThreads {
				return fmt.Sprintf("auto or 1..%d", tunnel.MaxThreads)
			}
			o.Threads = int(n)
			return ""
		},
	},
	{
		name: "log-level", values: "`debug`, `info`, `warn` or `error`", def: "info",
		help:  "the least important messages that are logged",
		words: []string{"debug", "info", "warn", "error"},
		get:   func(o *processOptions) string { return strings.ToLower(o.LogLevel.String()) },
		set: func(o *processOptions, v string) string {
			switch v {
			case "debug", "info", "warn", "error":
				o.LogLevel.UnmarshalText([]byte(v))
				return ""
			}
			return "debug, info, warn or error"
		},
	},
	{
		name: "log-format", values: "`text` or `json`", def: "text",
		help:  "how messages are written to standard error",
		words: []string{"text", "json"},
		get:   func(o *processOptions) string { return o.LogFormat },
		set: func(o *processOptions, v string) string {
			o.LogFormat = v
			if v != "text" && v != "json" {
				return "text or json"
			}
			return ""
		},
	},
}

// flagValue implements pflag.Value with functions.
type flagValue struct {
	set func(string) error
	get func() string
}

func (v *flagValue) Set(s string) error { return v.set(s) }
func (v *flagValue) String() string     { return v.get() }
func (v *flagValue) Type() string       { return "value" }

// addPropertyFlag adds the flag that sets p in config.
func addPropertyFlag(c *cobra.Command, config *tunnel.Config, p tunnel.Property) {
	addFlag(c, p.Name, p.Values, p.Default, p.Help, p.Words, &flagValue{
		set: func(v string) error { return p.Set(config, v) },
		get: func() string { return p.Get(config) },
	})
}

// addProcessFlag adds the flag that sets f in options.
func addProcessFlag(c *cobra.Command, options *processOptions, f processFlag) {
	addFlag(c, f.name, f.values, f.def, f.help, f.words, &flagValue{
		set: func(v string) error {
			if want := f.set(options, v); want != "" {
				return &tunnel.ValueError{Property: f.name, Value: v, Want: want}
			}
			return nil
		},
		get: func() string { return f.get(options) },
	})
}

func addFlag(c *cobra.Command, name, values, def, help string, words []string, value pflag.Value) {
	// In a usage text pflag takes a backquoted word for the name of the value.
	stripBackquotes := strings.NewReplacer("`", "").Replace
	usage := stripBackquotes(help + " [" + values + "]")
	switch def {
	case "required":
		usage, def = usage+" (required)", ""
	case "none":
		def = ""
	}
	f := &pflag.Flag{
		Name:        name,
		Usage:       usage,
		Value:       value,
		DefValue:    def,
		Annotations: map[string][]string{acceptedAnnotation: {stripBackquotes(values)}},
	}
	c.Flags().SortFlags = false
	c.Flags().AddFlag(f)
	complete := cobra.NoFileCompletions
	switch {
	case strings.HasSuffix(name, "-file"):
		complete = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)
	case name == runtimeDirFlag.name:
		complete = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs)
	case len(words) > 0:
		complete = cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
	}
	if err := c.RegisterFlagCompletionFunc(name, complete); err != nil {
		panic(err) // the flag has just been added
	}
}

// flagTable returns the text of docs/flags.md, which `make docs` writes.
func flagTable() string {
	var tunnelRows, ipsecRows, processRows strings.Builder
	row := func(b *strings.Builder, name, values, def, help string) {
		fmt.Fprintf(b, "| `--%s` | %s | %s | %s |\n", name, values, def, help)
	}
	for _, p := range tunnel.Properties() {
		b := &tunnelRows
		if strings.HasPrefix(p.Name, "ipsec-") {
			b = &ipsecRows
		}
		row(b, p.Name, p.Values, p.Default, p.Help)
	}
	for _, f := range processFlags {
		row(&processRows, f.name, f.values, f.def, f.help)
	}
	const head = "| flag | values | default | meaning |\n| --- | --- | --- | --- |\n"
	return flagsIntroduction +
		"\n## Tunnel\n\n" + head + tunnelRows.String() +
		"\n## Encryption\n\n" + head + ipsecRows.String() +
		"\n## Process\n\n" + head + processRows.String()
}

const flagsIntroduction = `# Flags of ipipd up

<!-- Written by "make docs" from the program's own tables: do not edit. -->

` + "`--flag value` and `--flag=value` are the same. `ipipd print` and `ipipd down` take `--runtime-dir`, `ipipd print`\n" +
	"also `--json`.\n"

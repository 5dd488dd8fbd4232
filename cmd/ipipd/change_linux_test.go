package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// request returns the request that the words of a command make.
func request(t *testing.T, words string) control.Request {
	t.Helper()
	args := strings.Fields(words)
	o := &changeOptions{Request: control.Request{Action: args[0]}}
	settings := args[1:]
	switch args[0] {
	case control.Set:
		o.Request.Names, settings = args[1:2], args[2:]
	case control.Remove, control.Enable, control.Disable:
		o.Request.Names, settings = args[1:], nil
	}
	if err := o.parse(nil, settings); err != nil {
		t.Fatal(err)
	}
	return o.Request
}

// shown returns the names of configs, each with - if it is disabled, and the settings that are not the default.
func shown(configs []tunnel.Config) string {
	var all []string
	for _, c := range configs {
		byDefault := configured("x")[0]
		byDefault.Name = c.Name
		text := c.Name
		if c.Disabled {
			text = "-" + text
		}
		for _, p := range tunnel.Changes(&byDefault, &c) {
			text += " " + p.Name + "=" + p.Get(&c)
		}
		all = append(all, text)
	}
	return strings.Join(all, "; ")
}

func TestChanged(t *testing.T) {
	before := configured("ipip1", "-ipip2", "to Riga, by the sea")
	for _, tt := range []struct{ words, want string }{
		{"set ipip1 dscp=46", "ipip1 dscp=46; -ipip2; to Riga, by the sea"},
		{"set ipip1 dscp=46 dont-fragment=inherit mtu=", "ipip1 dscp=46 dont-fragment=inherit; -ipip2; to Riga, by the sea"},
		{"set ipip2 address=10.0.0.1/30,10.0.0.5/30 address=10.0.0.9/30 !comment", "ipip1; -ipip2 address=10.0.0.1/30,10.0.0.5/30,10.0.0.9/30; to Riga, by the sea"},
		{"set ipip1 !keepalive", "ipip1 keepalive=off; -ipip2; to Riga, by the sea"},
		{"set ipip1 keepalive=", "ipip1; -ipip2; to Riga, by the sea"},
		{"set ipip1 disabled=yes", "-ipip1; -ipip2; to Riga, by the sea"},
		{"set ipip2 disabled=", "ipip1; ipip2; to Riga, by the sea"},
		{"set ipip2 name=ipip3", "ipip1; -ipip3; to Riga, by the sea"},
		{"set ipip1 name=ipip1", "ipip1; -ipip2; to Riga, by the sea"},
		{"set ipip1 name=ipip2", "error: name ipip2 is taken by a tunnel of this process: choose another"},
		{"set ipip1 name=", "input: name: \"\" is not accepted: want 1 to 127 bytes of text on one line, without / and not . .. all or default"},
		{"set ipip-33f1f1c4c7 name=ipip-33f1f1c4c7", "error: no tunnel named ipip-33f1f1c4c7: ipipd print lists those there are"},
		{"set ipip1 remote-address=", "input: remote-address: missing: want an IPv4 address, a DNS name or any"},
		{"set ipip1 dscp=64 mtu=1 remote-adress=1 ttl=1 ttl=2", `input: dscp: "64" is not accepted: want inherit or 0..63` + "\n" +
			`mtu: "1" is not accepted: want auto or 68..65515` + "\n" + `unknown property "remote-adress": did you mean remote-address?` + "\n" + `ttl: given twice: want it once`},
		{"set ipip1 keepalive-probe=echo", "input: keepalive-target: missing: want the inner IPv4 address that keepalive-probe echo asks"},
		{"set ipip1 disabled=no disabled=yes", "input: disabled: given twice: want it once"},
		{"set ipip1 disabled=maybe", `input: disabled: "maybe" is not accepted: want yes or no`},
		{"set ipip1 ipsec-phase2=aes128-sha1", `input: ipsec-secret-file: missing: want the secret for ipsec-phase2 "aes128-sha1", or no ipsec-phase2: without a secret nothing is encrypted`},
		{"add remote-address=198.51.100.1", "ipip1; -ipip2; to Riga, by the sea; "},
		{"add remote-address=198.51.100.1 name=ipip3 disabled=yes", "ipip1; -ipip2; to Riga, by the sea; -ipip3"},
		{"add remote-address=198.51.100.1 name=ipip2", "error: name ipip2 is taken by a tunnel of this process: choose another"},
		{"add dscp=1", "input: remote-address: missing: want an IPv4 address, a DNS name or any"},
		{"enable ipip2 ipip1", "ipip1; ipip2; to Riga, by the sea"},
		{"disable ipip1 ipip2 ipip1", "-ipip1; -ipip2; to Riga, by the sea"},
		{"disable ipip1 ipip9", "error: no tunnel named ipip9: ipipd print lists those there are"},
		{"remove ipip1 ipip2", "to Riga, by the sea"},
	} {
		got, err := changed(before, request(t, tt.words))
		text := shown(got)
		var refused *control.Refusal
		switch {
		case errors.As(err, &refused) && refused.Input:
			text = "input: " + err.Error()
		case err != nil:
			text = "error: " + err.Error()
		}
		if d := cmp.Diff(tt.want, text); d != "" {
			t.Errorf("%s: %s", tt.words, d)
		}
	}
	if d := cmp.Diff(configured("ipip1", "-ipip2", "to Riga, by the sea"), before, cmpopts.EquateComparable(netip.Addr{})); d != "" {
		t.Errorf("what was changed: %s", d)
	}
}

// As many errors are told at once as of a file.
func TestChanged_manyErrors(t *testing.T) {
	_, err := changed(configured("ipip1"), request(t, "set ipip1 route="+strings.Repeat("x,", config.MaxShown+5)))
	if err == nil || strings.Count(err.Error(), "\n") != config.MaxShown || !strings.HasSuffix(err.Error(), "\nand 5 more") {
		t.Errorf("%v", err)
	}
}

// A tunnel goes by its name or its interface's, and no other tunnel can take the latter.
func TestChanged_longName(t *testing.T) {
	before := configured("to Riga", "ipip1")
	link := tunnel.InterfaceName("to Riga")
	got, err := changed(before, control.Request{Action: control.Set, Names: []string{link}, Settings: []control.Setting{{Property: "dscp", Value: []byte("1")}}})
	if text := shown(got); err != nil || text != "to Riga dscp=1; ipip1" {
		t.Errorf("%s, %v", text, err)
	}
	want := "name " + link + " is the interface's of the tunnel to Riga: choose another"
	for _, words := range []string{"set ipip1 name=" + link, "set " + link + " name=" + link} {
		if _, err := changed(before, request(t, words)); err == nil || err.Error() != want {
			t.Errorf("%s: %v", words, err)
		}
	}
}

// No error contains a secret.
func TestChanged_secret(t *testing.T) {
	for _, words := range []string{"ipsec-secret=hunter2\n", "ipsec-secret=hunter2 ipsec-secret-file=/x"} {
		r := control.Request{Action: control.Set, Names: []string{"ipip1"}}
		for _, word := range strings.Split(words, " ") {
			property, value, _ := strings.Cut(word, "=")
			r.Settings = append(r.Settings, control.Setting{Property: property, Value: []byte(value)})
		}
		if _, err := changed(configured("ipip1"), r); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
	}
}

// A secret reaches the tunnel as the bytes that it is.
func TestProcessChange_secret(t *testing.T) {
	p, _, log := runProcess(t, nil, "ipip1")
	const secret = "hunter2, \xff\xfe"
	for _, args := range [][]string{{secretProperty + "=" + secret}, {secretProperty}} {
		t.Setenv(secretEnv, secret)
		status, _, errs := command(append([]string{"set", "ipip1", "--runtime-dir", p.options.RuntimeDir}, args...)...)
		if warned := errs != ""; status != 0 || warned != (args[0] != secretProperty) || strings.Contains(errs+log.String(), "hunter2") {
			t.Errorf("%q: status %d, %s%s", args, status, errs, log)
		}
		if got := string(p.wanted.Load().configs[0].IPsec.Secret); got != secret {
			t.Errorf("%q: it is %q", args, got)
		}
		ask(t, p, 0, "set ipip1 ipsec-secret=")
	}
}

// After set, add and the others the list that they make runs, and after an error the one before.
func TestProcessChange(t *testing.T) {
	p, e, log := runProcess(t, nil, "ipip1", "-ipip2")
	dir := []string{"--runtime-dir", p.options.RuntimeDir}
	for _, tt := range []struct{ words, out, runs, links string }{
		{"set ipip1 dscp=46 comment=x", "", "ipip1", "ipip1 ipip2"},
		{"enable ipip2", "", "ipip1 ipip2", "ipip1 ipip2"},
		{"disable ipip1 ipip2", "", "", "ipip1 ipip2"},
		{"enable ipip1", "", "ipip1", "ipip1 ipip2"},
		{"add name=t-add remote-address=r2.example disabled=yes", "t-add\n", "ipip1", "ipip1 ipip2 t-add"},
		{"set t-add name=t-new disabled=no", "", "ipip1 t-new", "ipip1 ipip2 t-new"},
		{"remove ipip1 t-new", "", "", "ipip2"},
		{"set ipip2 disabled=no", "", "ipip2", "ipip2"},
	} {
		status, out, errs := command(append(strings.Fields(tt.words), dir...)...)
		if status != 0 || out != tt.out || errs != "" || e.runs() != tt.runs || links(t, p) != tt.links {
			t.Errorf("%s: status %d, %s, %s, runs %s, reserved %s", tt.words, status, out, errs, e.runs(), links(t, p))
		}
	}
	if !strings.Contains(log.String(), `msg="the tunnels are changed: ipipd remove" names="[ipip1 t-new]"`) {
		t.Errorf("the log: %s", log)
	}
	status, out, errs := command(append([]string{"add", "remote-address=192.0.2.1"}, dir...)...)
	name := strings.TrimSpace(out)
	if status != 0 || !strings.HasPrefix(name, "ipip") || name == "ipip2" {
		t.Errorf("add: status %d, %s, %s", status, out, errs)
	}
	e.refuse = func(context.Context, []tunnel.Config) error { return errors.New("no route to it: " + name) }
	before := p.wanted.Load()
	for words, want := range map[string]string{
		"set ipip2 dscp=1":                      "ipipd: no route to it: " + name + "\n",
		"set ipip2 name=t-new":                  "ipipd: no route to it: " + name + "\n",
		"add remote-address=192.0.2.3":          "ipipd: no route to it: " + name + "\n",
		"add remote-address=192.0.2.3 name=lo":  "ipipd: name lo is taken by an interface of this host: choose another\n",
		"disable ipip2":                         "ipipd: no route to it: " + name + "\n",
		"remove ipip2":                          "ipipd: no route to it: " + name + "\n",
		"remove ipip2 t-none":                   "ipipd: no tunnel named t-none in " + p.options.RuntimeDir + ": ipipd print lists those there are\n",
		"set ipip2 dscp=64 mtu=1":               "",
		"add dscp=64 name=t-new local-address=": "",
	} {
		status, out, errs := command(append(strings.Fields(words), dir...)...)
		wantStatus := 1
		if want == "" {
			wantStatus, want = 2, errs
		}
		if status != wantStatus || out != "" || errs != want || p.wanted.Load() != before {
			t.Errorf("%s: status %d, %s%s", words, status, out, errs)
		}
		if got := links(t, p); got != "ipip2 "+name && got != name+" ipip2" {
			t.Errorf("%s: reserved %s", words, got)
		}
	}
	e.refuse = nil
}

// Names of tunnels of several processes each go to the process of the tunnel; add needs a single process.
func TestNamesByProcess(t *testing.T) {
	a, one, _ := runProcess(t, nil, "ipip1", "ipip2")
	_, other, _ := runProcess(t, func(o *upOptions) { o.RuntimeDir = a.options.RuntimeDir }, "ipip3")
	dir := []string{"--runtime-dir", a.options.RuntimeDir}
	if status, _, errs := command(append(dir, "disable", "ipip3", "ipip1")...); status != 0 || one.runs() != "ipip2" || other.runs() != "" {
		t.Errorf("disable: status %d, %s, %s and %s run", status, errs, one.runs(), other.runs())
	}
	want := "ipipd: no tunnel named t-none in " + a.options.RuntimeDir + ": ipipd print lists those there are\n"
	if status, _, errs := command(append(dir, "enable", "ipip3", "t-none")...); status != 1 || errs != want || other.runs() != "" {
		t.Errorf("one that is nowhere: status %d, %s", status, errs)
	}
	want = "ipipd: 2 ipipd up run in " + a.options.RuntimeDir + ", and a tunnel is added to one: "
	if status, _, errs := command(append(dir, "add", "remote-address=192.0.2.1")...); status != 1 || !strings.HasPrefix(errs, want) {
		t.Errorf("add: status %d, %s", status, errs)
	}
}

// After any concurrent changes the wanted tunnels are those that run, and whose names are reserved.
func TestProcessChange_concurrent(t *testing.T) {
	// t-stays keeps down from ending the process; t-down is a name that add does not give, and that down would wait for.
	p, e, _ := runProcess(t, nil, "ipip1", "-ipip2", "t-down", "t-stays")
	dir := []string{"--runtime-dir", p.options.RuntimeDir}
	var wg sync.WaitGroup
	for _, words := range []string{
		"set ipip1 dscp=1", "disable ipip1", "enable ipip2", "down t-down", "add remote-address=198.51.100.9", "set ipip2 name=t-new",
		"add name=t-other remote-address=198.51.100.9", "remove t-other", "disable ipip1 --confirm 1h", "confirm", "print", "set t-new dscp=2",
	} {
		for range 4 {
			wg.Go(func() { command(append(strings.Fields(words), dir...)...) })
		}
	}
	wg.Wait()
	configs := p.wanted.Load().configs
	var runs, reserved []string
	for _, c := range configs {
		reserved = append(reserved, c.Name)
		if !c.Disabled {
			runs = append(runs, c.Name)
		}
	}
	slices.Sort(runs)
	slices.Sort(reserved)
	if got := e.runs(); got != strings.Join(runs, " ") {
		t.Errorf("%s runs, want %s", got, runs)
	}
	if got := links(t, p); got != strings.Join(reserved, " ") {
		t.Errorf("reserved: %s, want %s", got, reserved)
	}
}

// A reload names the settings of the process that have changed and that it cannot change, but not those of flags.
func TestProcess_settings(t *testing.T) {
	file := filepath.Join(shortDir(t), "ipipd.yaml")
	const text = "{runtime-dir: /run/other, log-level: debug, threads: 2, log-format: text, tunnels: []}"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p, _, log := runProcess(t, func(o *upOptions) {
		o.Paths, o.LogLevel = []string{file}, "warn"
		o.given = map[string]bool{"runtime-dir": true, "log-level": true}
	}, "ipip1")
	p.hangUp(t.Context())
	const want = `level=WARN msg="settings of the process have changed: they are used once it is started again" settings=[threads]`
	if !strings.Contains(log.String(), want) {
		t.Errorf("the log: %s", log)
	}
}

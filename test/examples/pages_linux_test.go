package examples

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"ipipd/test/netlab"
)

// docs is where the pages are.
const docs = "../../docs"

// A page of docs that is run begins with a comment that has its laboratory,
//
//	<!-- laboratory:
//	a 192.0.2.1 203.0.113.1
//	b 198.51.100.1 guest
//	need: bird bird2
//	a: a command that is run on a before the page
//	-->
//
// hosts by the addresses of eth0, eth1 and so on, joined by the host "router": a namespace each, or a guest, whose kernel has
// ipip, or a guest with "strongswan". need names a program and its package, without which the test is skipped. The fenced
// blocks of the page are run in order. The words after a block's language say how:
//
//	sh a,b          each line is run on host a, then on b, and has to succeed; ipipd up, and what ends in &, goes on in the background
//	console a       each line after "$ " is run on a until its output has the lines below it, in order, in which … is any text
//	yaml a /file    it is this file of host a, and ipipd check takes it
//	yaml a /file packaging/examples/x.yaml    the same, and those lines are in that file of the tree
//	yaml packaging/examples/x.yaml            its lines are in that file
//	routeros b      ipipd on host b has these tunnels, and no others, in the place of RouterOS
//	text by TestX   the test of that name runs it, or something that is compared with it
//	text not-run: a drawing    it is not run, for that reason
//
// A page without a laboratory has blocks of the last two kinds only; one that is generated may have none.
type page struct {
	name       string
	laboratory []string // its lines; nil: none
	blocks     []block
}

// block is a fenced block of a page.
type block struct {
	line     int // of the page
	language string
	words    []string // after the language
	text     string
}

// parsePage reads a page of docs.
func parsePage(name, text string) (*page, error) {
	p := &page{name: name}
	var fence *block
	n, comment, last := 0, false, ""
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimRight(line, "\n")
		switch {
		case comment && line == "-->":
			comment = false
		case comment:
			p.laboratory = append(p.laboratory, line)
		case fence == nil && line == "<!-- laboratory:":
			comment, p.laboratory = true, []string{}
		case fence == nil && strings.HasPrefix(strings.TrimLeft(line, " "), "```"):
			words := strings.Fields(strings.TrimLeft(line, " `"))
			if len(words) < 2 {
				return nil, fmt.Errorf("docs/%s:%d: the block says not what is done with it", name, n)
			}
			fence = &block{line: n, language: words[0], words: words[1:]}
			switch elsewhere := fence.elsewhere(); {
			case elsewhere && len(words) < 3:
				return nil, fmt.Errorf("docs/%s:%d: the block says not why it is not run here", name, n)
			case !elsewhere && p.laboratory == nil:
				return nil, fmt.Errorf("docs/%s:%d: there is no laboratory to run the block in", name, n)
			}
		case fence != nil && strings.TrimLeft(line, " ") == "```":
			p.blocks = append(p.blocks, *fence)
			fence = nil
		case fence != nil:
			fence.text += line + "\n"
		case strings.HasPrefix(line, "    ") && last == "":
			return nil, fmt.Errorf("docs/%s:%d: an indented block, which is not run: fence it", name, n)
		}
		last = line
	}
	if fence != nil || comment {
		return nil, fmt.Errorf("docs/%s: a block or a comment does not end", name)
	}
	return p, nil
}

// elsewhere reports whether TestPages does nothing with a block: another test does, or none.
func (b *block) elsewhere() bool { return b.words[0] == "by" || b.words[0] == "not-run:" }

// machine is a host of a page's laboratory.
type machine interface {
	run(script string) (output string, err error)
	// background starts a command that goes on until the end of the test.
	background(command string) *process
	write(file, text string) error
}

// nsMachine is a network namespace with /etc and /run of its own, and ipipd in its PATH.
type nsMachine struct {
	t      *testing.T
	ns     *netlab.NS
	mounts string // its mount namespace
	bin    string
}

func newNSMachine(t *testing.T, ns *netlab.NS) *nsMachine {
	t.Helper()
	dir := t.TempDir()
	m := &nsMachine{t: t, ns: ns, bin: filepath.Join(dir, "bin")}
	if err := os.Mkdir(m.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(netlab.Binary(t), filepath.Join(m.bin, "ipipd")); err != nil {
		t.Fatal(err)
	}
	etc := filepath.Join(dir, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	holder := start(t, ns, "unshare", "--mount", "--propagation", "private", "sh", "-ec",
		fmt.Sprintf("mount -t tmpfs none %[1]s; cp -a /etc/. %[1]s; mount --bind %[1]s /etc; mount -t tmpfs none /run; mkdir -p /etc/ipipd; echo mounted; exec sleep infinity", etc))
	netlab.Eventually(t, "a host has its own /etc and /run", func() bool {
		if ended(holder) {
			t.Fatalf("unshare: %s", holder.log.String())
		}
		return strings.Contains(holder.log.String(), "mounted")
	})
	m.mounts = fmt.Sprintf("/proc/%d/ns/mnt", holder.Process.Pid)
	return m
}

// command returns a command that runs a script in the host's namespaces.
func (m *nsMachine) command(script string) (name string, args []string) {
	return "nsenter", []string{"--net=" + m.ns.Path(), "--mount=" + m.mounts, "--wd=/etc", "env", "PATH=" + m.bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LC_ALL=C.UTF-8", "sh", "-c", script}
}

func (m *nsMachine) run(script string) (output string, err error) {
	name, args := m.command(script)
	return m.ns.Try("timeout", append([]string{netlab.Seconds(netlab.Timeout()), name}, args...)...)
}

func (m *nsMachine) background(command string) *process {
	m.t.Helper()
	name, args := m.command("exec " + command)
	return start(m.t, m.ns, name, args...)
}

func (m *nsMachine) write(file, text string) error {
	from := filepath.Join(m.bin, "file")
	if err := os.WriteFile(from, []byte(text), 0o600); err != nil {
		return err
	}
	out, err := m.run(fmt.Sprintf("umask 077; mkdir -p '%s' && cat '%s' >'%s'", filepath.Dir(file), from, file))
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// guestMachine is a host with a kernel of its own.
type guestMachine struct{ *netlab.Guest }

func (m guestMachine) run(script string) (output string, err error) {
	return m.Run("exec 2>&1\nexport STRONGSWAN_CONF=/tmp/strongswan.conf\n" + script)
}

func (m guestMachine) background(command string) *process {
	panic("no command of a guest goes on in the background")
}

func (m guestMachine) write(file, text string) error {
	// The root is read-only.
	_, err := m.Run(fmt.Sprintf("dir=$(dirname '%[1]s'); mountpoint -q $dir || mount -t tmpfs none $dir; cat >'%[1]s' <<'END-OF-FILE'\n%[2]sEND-OF-FILE", file, text))
	return err
}

// newLaboratory makes the hosts of a page, and runs the commands of its laboratory.
func newLaboratory(t *testing.T, p *page) map[string]machine {
	t.Helper()
	machines := map[string]machine{}
	u := newUnderlay(t)
	machines["router"] = newNSMachine(t, u.router)
	for _, line := range p.laboratory {
		if name, command, ok := strings.Cut(line, ": "); ok {
			if program, pkg, _ := strings.Cut(command, " "); name == "need" {
				need(t, program, pkg)
				continue
			}
			m := machines[name]
			if m == nil {
				t.Fatalf("docs/%s: the laboratory has no %s", p.name, name)
			}
			runCommand(t, "the laboratory of docs/"+p.name, m, command)
			continue
		}
		words := strings.Fields(line)
		if len(words) < 2 {
			t.Fatalf("docs/%s: %q is no host of a laboratory", p.name, line)
		}
		name, address, kind := words[0], words[1], words[len(words)-1]
		switch kind {
		case "guest":
			machines[name] = guestMachine{netlab.StartGuest(t, u.spare(t, address), "guest0", netlab.GuestOptions{Address: address + "/24", Modules: netlab.ModulesIPIP})}
		case "strongswan":
			machines[name] = guestMachine{netlab.StartStrongSwan(t, u.spare(t, address), "guest0", address+"/24", "").Guest}
		default:
			ns, _ := u.node(t, address)
			for i, more := range words[2:] {
				u.join(t, ns, fmt.Sprint("eth", i+1), more)
			}
			machines[name] = newNSMachine(t, ns)
			continue
		}
		runCommand(t, p.name, machines[name], "ip route add default via "+gateway(address).String())
	}
	return machines
}

// runBlock runs a block as its words say.
func runBlock(t *testing.T, p *page, b block, machines map[string]machine) {
	t.Helper()
	where := fmt.Sprintf("docs/%s:%d", p.name, b.line)
	if b.elsewhere() {
		return
	}
	words := b.words
	if last := words[len(words)-1]; strings.HasPrefix(last, "packaging/") {
		text, err := os.ReadFile("../../" + last)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), b.text) {
			t.Fatalf("%s is not in %s", where, last)
		}
		if words = words[:len(words)-1]; len(words) == 0 {
			return
		}
	}
	for name := range strings.SplitSeq(words[0], ",") {
		m := machines[name]
		if m == nil {
			t.Fatalf("%s: the laboratory has no %s", where, name)
		}
		runOn(t, where, b, m, words)
	}
}

func runOn(t *testing.T, where string, b block, m machine, words []string) {
	t.Helper()
	if len(words) == 2 {
		if err := m.write(words[1], b.text); err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		if strings.HasPrefix(words[1], "/etc/ipipd/") && filepath.Ext(words[1]) != "" {
			if out, err := m.run("ipipd check " + words[1]); err != nil {
				t.Fatalf("%s: ipipd check: %v\n%s", where, err, out)
			}
		}
		return
	}
	switch b.language {
	case "sh":
		for command := range strings.Lines(strings.ReplaceAll(b.text, "\\\n", " ")) {
			if command = strings.TrimSpace(command); command != "" {
				runCommand(t, where, m, command)
			}
		}
	case "console":
		for _, e := range expectations(b.text) {
			e.await(t, where, m)
		}
	case "routeros":
		if err := m.write("/etc/ipipd/peer.rsc", b.text); err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		if _, err := m.run("ipipd reload"); err != nil { // nothing runs yet
			runCommand(t, where, m, "ipipd up --config /etc/ipipd/peer.rsc")
		}
	default:
		t.Fatalf("%s: nothing is known of how %s is run", where, b.language)
	}
}

// runCommand runs a command, which has to succeed; ipipd up, also under ipipd keep, has to become ready.
func runCommand(t *testing.T, where string, m machine, command string) {
	t.Helper()
	if command, ok := strings.CutSuffix(command, " &"); ok {
		m.background(command)
		return
	}
	if !strings.HasPrefix(command, "ipipd up") && !strings.HasPrefix(command, "ipipd keep") {
		if out, err := m.run(command); err != nil {
			t.Fatalf("%s: %s: %v\n%s", where, command, err, out)
		}
		return
	}
	p := m.background(command)
	ready := regexp.MustCompile(`msg="tunnel (is ready|waits)"`)
	netlab.Eventually(t, where+": "+command+" is ready", func() bool {
		if ended(p) {
			t.Fatalf("%s: %s has ended:\n%s", where, command, p.log.String())
		}
		return ready.MatchString(p.log.String())
	})
}

// ended reports whether a process that nobody waits for yet has exited.
func ended(p *process) bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.Process.Pid))
	return err != nil
}

// expectation is a command, and the lines that its output must have.
type expectation struct {
	command string
	want    []string
}

func expectations(text string) (list []expectation) {
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			list = append(list, expectation{command: command})
		} else if e := len(list) - 1; e >= 0 && line != "" {
			list[e].want = append(list[e].want, line)
		}
	}
	return list
}

// await runs the command until its output has the wanted lines; without any, until it succeeds.
func (e *expectation) await(t *testing.T, where string, m machine) {
	t.Helper()
	var out, missing string
	var err error
	if !netlab.WaitFor(func() bool {
		out, err = m.run(e.command)
		if len(e.want) == 0 {
			return err == nil
		}
		missing = unmatched(out, e.want)
		return missing == ""
	}) {
		t.Fatalf("%s: %s: %v: no line is %q, in its place, of:\n%s", where, e.command, err, missing, out)
	}
}

// unmatched returns the first of the wanted lines that the output does not have after those before it, or "".
func unmatched(output string, want []string) string {
	lines := strings.Split(output, "\n")
	for _, w := range want {
		var parts []string
		for _, part := range strings.Split(strings.Join(strings.Fields(w), " "), "…") {
			parts = append(parts, regexp.QuoteMeta(part))
		}
		pattern := regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
		for {
			if len(lines) == 0 {
				return w
			}
			line := strings.Join(strings.Fields(lines[0]), " ")
			lines = lines[1:]
			if pattern.MatchString(line) {
				break
			}
		}
	}
	return ""
}

// pages returns the pages of docs.
func pages(t *testing.T) (list []*page) {
	t.Helper()
	files, err := filepath.Glob(docs + "/*.md")
	if err != nil || len(files) == 0 {
		t.Fatal(err, files)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		p, err := parsePage(filepath.Base(file), string(text))
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
	return list
}

// The commands in the pages of docs do what the pages say.
func TestPages(t *testing.T) {
	t.Parallel()
	for _, p := range pages(t) {
		if p.laboratory == nil {
			continue
		}
		t.Run(strings.TrimSuffix(p.name, ".md"), func(t *testing.T) {
			t.Parallel()
			machines := newLaboratory(t, p)
			for _, b := range p.blocks {
				runBlock(t, p, b, machines)
			}
		})
	}
}

func TestPages_unmatched(t *testing.T) {
	t.Parallel()
	const output = "a  b\nkeepalive-state: up\n  last-heard: never (3s)\n"
	for _, tt := range []struct {
		want []string
		miss string
	}{
		{[]string{"a b", "last-heard: … (…)"}, ""},
		{[]string{"keepalive-state:   up"}, ""},
		{[]string{"keepalive-state: u"}, "keepalive-state: u"},
		{[]string{"last-heard: …", "a b"}, "a b"},
	} {
		if got := unmatched(output, tt.want); got != tt.miss {
			t.Errorf("%q: %q is not found, want %q", tt.want, got, tt.miss)
		}
	}
}

func TestPages_parse(t *testing.T) {
	t.Parallel()
	p, err := parsePage("p.md", "# P\n\n<!-- laboratory:\na 192.0.2.1\na: true\n-->\n\n```console a\n$ x\ny\n$ z\n```\n```yaml a /f packaging/g\nk: v\n```\n")
	if err != nil || len(p.laboratory) != 2 || len(p.blocks) != 2 {
		t.Fatalf("%+v, %v", p, err)
	}
	if list := expectations(p.blocks[0].text); len(list) != 2 || list[0].command != "x" || list[0].want[0] != "y" || list[1].want != nil {
		t.Errorf("%+v", list)
	}
	if b := p.blocks[1]; b.language != "yaml" || strings.Join(b.words, " ") != "a /f packaging/g" || b.text != "k: v\n" || b.line != 13 {
		t.Errorf("%+v", b)
	}
	if p, err := parsePage("p.md", "text\n```text not-run: a drawing\nx\n```\n  ```sh by TestX\n  x\n  ```\n"); err != nil || p.laboratory != nil || len(p.blocks) != 2 || !p.blocks[1].elsewhere() {
		t.Errorf("%+v, %v", p, err)
	}
	for _, text := range []string{"```\nx\n```\n", "```sh\nx\n```\n", "```sh a\n", "```sh not-run:\nx\n```\n", "```sh by\nx\n```\n", "text\n\n    x\n"} {
		for _, laboratory := range []string{"", "<!-- laboratory:\n-->\n"} {
			if _, err := parsePage("p.md", laboratory+text); err == nil {
				t.Errorf("%q is taken", laboratory+text)
			}
		}
	}
	if _, err := parsePage("p.md", "```sh a\nx\n```\n"); err == nil {
		t.Error("a block without a laboratory is taken")
	}
}

// The tests that pages name in blocks with "by TestX" exist.
func TestPages_elsewhere(t *testing.T) {
	t.Parallel()
	tests := map[string]bool{}
	declaration := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err := filepath.WalkDir("../..", func(path string, entry os.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range declaration.FindAllSubmatch(source, -1) {
			tests[string(m[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if b.words[0] == "by" && (len(b.words) != 2 || !tests[b.words[1]]) {
				t.Errorf("docs/%s:%d: there is no test %q", p.name, b.line, b.words[1:])
			}
		}
	}
}

// README.md's quick start has only commands that are in the pages, and so are run.
func TestPages_quickStart(t *testing.T) {
	t.Parallel()
	ran := map[string]bool{}
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			for line := range strings.Lines(b.text) {
				if !b.elsewhere() {
					ran[strings.TrimSpace(line)] = true
				}
			}
		}
	}
	for _, command := range slices.Concat(readmeBlocks(t, "Quick start")...) {
		if !ran[command] {
			t.Errorf("README.md has %q: no page of docs runs it", command)
		}
	}
}

// README.md's commands about the state of a tunnel work with the tunnel of its quick start.
func TestPages_status(t *testing.T) {
	t.Parallel()
	commands := readmeBlocks(t, "Status")[0]
	m := newLaboratory(t, &page{name: "../README.md", laboratory: []string{
		"a 192.0.2.1", "b 198.51.100.1",
		"b: ipipd up --name ipip1 --local-address 198.51.100.1 --remote-address 192.0.2.1 --address 10.255.0.2/30",
		"a: " + readmeBlocks(t, "Quick start")[0][0],
		"a: ping -n -i 0.1 10.255.0.2 &",
	}})["a"]
	for _, command := range commands {
		// These two go on until ^C.
		switch _, file, _ := strings.Cut(command, " -w "); {
		case strings.HasPrefix(command, "ipipd monitor"):
			p := m.background(command)
			netlab.Eventually(t, command+" shows the tunnel", func() bool { return strings.Contains(p.log.String(), "name=ipip1 state=running") })
		case file != "":
			file, _, _ = strings.Cut(file, " ")
			m.background(command)
			netlab.Eventually(t, command+" has packets", func() bool { _, err := m.run("test -s " + file); return err == nil })
		default:
			runCommand(t, "README.md", m, command)
		}
	}
	if out, err := m.run("ip link show ipip1"); !strings.Contains(commands[len(commands)-2], "ipipd down") || err == nil {
		t.Errorf("after %s the interface is there: %s", commands[len(commands)-2], out)
	}
}

// readmeBlocks returns the lines of each indented block of a section of README.md, which must have one.
func readmeBlocks(t *testing.T, section string) (blocks [][]string) {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n## "+section+"\n")
	rest, _, _ = strings.Cut(rest, "\n## ")
	within := false
	for line := range strings.Lines(rest) {
		if line, indented := strings.CutPrefix(line, "    "); indented && within {
			blocks[len(blocks)-1] = append(blocks[len(blocks)-1], strings.TrimSpace(line))
		} else if within = indented; indented {
			blocks = append(blocks, []string{strings.TrimSpace(line)})
		}
	}
	if len(blocks) == 0 {
		t.Fatalf("README.md has no block under %s", section)
	}
	return blocks
}

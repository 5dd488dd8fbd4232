package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"ipipd/internal/config"
)

func init() {
	platformCommands = append(platformCommands, func(s *streams) *cobra.Command { return newCmdBugreport(s, bugreportRun) })
}

type bugreportOptions struct {
	processOptions
	streams *streams
	Output  string
	Paths   []string
	// given are the names of the flags that were given.
	given map[string]bool
}

func newCmdBugreport(s *streams, runF func(context.Context, *bugreportOptions) error) *cobra.Command {
	o := &bugreportOptions{processOptions: config.DefaultProcess(), streams: s}
	c := &cobra.Command{
		Use:   "bugreport",
		Short: "Write a file with what somebody needs to help: state, findings, configuration without secrets",
		Long: `bugreport writes a .tar.gz with what ipipd doctor finds, ipipd print, the configuration
that runs with its secrets left out, this host's interfaces, addresses, routes and
firewall rules, versions, and the last lines that the system's log has of ipipd. It
sends nothing to anybody. Addresses and comments are in it as they are: read it
before you give it away.

Where nothing runs it has the configuration in /etc/ipipd, or what is wrong with it.`,
		Example:           "  ipipd bugreport --output report.tar.gz\n  ipipd bugreport --config new.yaml",
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, _ []string) error {
			o.given = map[string]bool{}
			c.Flags().Visit(func(f *pflag.Flag) { o.given[f.Name] = true })
			return runF(c.Context(), o)
		},
	}
	c.Flags().StringVar(&o.Output, "output", "", "the file, which must not exist, or - for standard output (default ipipd-bugreport-TIME.tar.gz here)")
	c.Flags().StringArrayVar(&o.Paths, configFlag, nil, "beside what runs, and for doctor, this configuration (default "+configFolder+" if nothing runs)")
	addProcessFlag(c, &o.processOptions, config.RuntimeDir)
	return c
}

func bugreportRun(ctx context.Context, o *bugreportOptions) error {
	for _, path := range o.Paths {
		if _, err := os.Stat(path); err != nil {
			return asUsage(err)
		}
	}
	now := time.Now()
	dir := "ipipd-bugreport-" + now.UTC().Format("20060102-150405")
	var b bytes.Buffer
	if err := o.write(ctx, &b, dir, now); err != nil {
		return err
	}
	if o.Output == "-" {
		_, err := o.streams.out.Write(b.Bytes())
		return err
	}
	name := o.Output
	if name == "" {
		name = dir + ".tar.gz"
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return withRemedy(err, "give another --output")
	}
	_, err = f.Write(b.Bytes())
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(name))
	}
	_, err = fmt.Fprintf(o.streams.out, "%s: read it before you give it away: addresses and comments are in it, secrets are not\n", name)
	return err
}

// hostCommands are the commands whose output is in a report.
var hostCommands = []string{
	"ip -s -d link", "ip address", "ip route show table all", "ip rule", "ip -s neighbour", "ip xfrm policy",
	"nft list ruleset", "iptables-nft-save", "sysctl -a -r net.ipv4.*(rp_filter|ip_forward|accept_local)", "lsmod",
	"journalctl --no-pager --lines 500 --output short-iso _COMM=ipipd", "tail -n 500 /var/log/ipipd.log", "logread -l 500 -e ipipd",
}

const (
	commandTimeout  = 10 * time.Second
	maxCommandBytes = 4 << 20
)

// write writes the archive. Where something cannot be had its file says why.
func (o *bugreportOptions) write(ctx context.Context, w io.Writer, dir string, now time.Time) error {
	zip := gzip.NewWriter(w)
	archive := tar.NewWriter(zip)
	var failed error
	file := func(name string, content []byte) {
		h := &tar.Header{Name: dir + "/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: now}
		if err := archive.WriteHeader(h); err != nil {
			failed = errors.Join(failed, err)
			return
		}
		_, err := archive.Write(content)
		failed = errors.Join(failed, err)
	}
	text := func(name string, write func(*bytes.Buffer) error) {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			b.WriteString("it could not be had: " + oneLine(err) + "\n")
		}
		file(name, b.Bytes())
	}

	text("versions.txt", versions)
	statuses, _ := queryStatuses(o.RuntimeDir, "") // doctor says which processes do not answer
	paths := o.Paths
	if _, err := os.Stat(configFolder); err == nil && len(statuses)+len(paths) == 0 {
		paths = []string{configFolder}
	}
	d := &doctorOptions{processOptions: o.processOptions, Paths: paths, given: o.given}
	report, err := d.examine(ctx)
	if err != nil && len(paths) > 0 && ctx.Err() == nil { // configured.yaml says what is wrong
		d.Paths = nil
		report, err = d.examine(ctx)
	}
	text("doctor.txt", func(b *bytes.Buffer) error {
		if err != nil {
			return err
		}
		return writeReport(b, report, false)
	})
	text("doctor.json", func(b *bytes.Buffer) error {
		if err != nil {
			return err
		}
		return writeJSON(b, report)
	})
	text("print.json", func(b *bytes.Buffer) error { return printJSON(b, statuses) })
	text("configuration.yaml", func(b *bytes.Buffer) error {
		s, notes, err := snapshot(o.RuntimeDir, nil)
		for _, note := range notes {
			fmt.Fprintln(b, "# "+oneLine(errors.New(note)))
		}
		if err != nil {
			return err
		}
		return writeHidden(b, s.Process, s.Tunnels)
	})
	if len(paths) > 0 {
		text("configured.yaml", func(b *bytes.Buffer) error {
			up := upOptions{processOptions: o.processOptions, Paths: paths, given: o.given}
			_, configs, err := up.readConfiguration()
			if err != nil {
				return err
			}
			var entries []config.Entry
			for _, c := range configs {
				entries = append(entries, config.Entry{Config: c})
			}
			return writeHidden(b, up.processOptions, entries)
		})
	}
	commands := hostCommands
	if tables, err := os.ReadFile("/proc/net/ip_tables_names"); err == nil && len(tables) > 0 { // else it might load modules
		commands = append(slices.Clone(commands), "iptables-legacy-save")
	}
	for _, line := range commands {
		words := strings.Fields(line)
		text(words[0]+"-"+strings.Trim(strings.Map(plainRune, strings.Join(words[1:], "-")), "-")+".txt", func(b *bytes.Buffer) error {
			return runCommand(ctx, b, words)
		})
	}
	return errors.Join(failed, archive.Close(), zip.Close())
}

// writeHidden writes a configuration without its secrets.
func writeHidden(w io.Writer, process config.Process, entries []config.Entry) error {
	for i := range entries {
		entries[i].HideSecret = true
	}
	return config.WriteYAML(w, process, entries)
}

// plainRune is a mapping of strings.Map that drops all but the letters a to z and hyphens, for a file's name.
func plainRune(r rune) rune {
	if r >= 'a' && r <= 'z' || r == '-' {
		return r
	}
	return -1
}

// runCommand writes a command and its output.
func runCommand(ctx context.Context, b *bytes.Buffer, words []string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	fmt.Fprintf(b, "$ %s\n", strings.Join(words, " "))
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	out, err := cmd.CombinedOutput()
	if len(out) > maxCommandBytes {
		out = append(out[:maxCommandBytes], "\n... and more\n"...)
	}
	b.Write(out)
	return err
}

// versions writes the versions of ipipd, of the kernel and of the distribution.
func versions(b *bytes.Buffer) error {
	fmt.Fprintln(b, versionLine())
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return os.NewSyscallError("uname", err)
	}
	fmt.Fprintf(b, "%s %s %s %s\n", unix.ByteSliceToString(u.Sysname[:]), unix.ByteSliceToString(u.Release[:]),
		unix.ByteSliceToString(u.Version[:]), unix.ByteSliceToString(u.Machine[:]))
	release, err := os.ReadFile("/etc/os-release")
	b.Write(release)
	return err
}

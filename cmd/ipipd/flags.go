package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/config"
	"ipipd/internal/tunnel"
)

// acceptedAnnotation is the annotation of a flag with the values it accepts, for flagError.
const acceptedAnnotation = "accepted"

// processOptions is embedded by each command that has flags of the process.
type processOptions = config.Process

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

// addProcessFlag adds the flag that sets p in options.
func addProcessFlag(c *cobra.Command, options *config.Process, p config.ProcessProperty) {
	addFlag(c, p.Name, p.Values, p.Default, p.Help, p.Words, &flagValue{
		set: func(v string) error { return p.Set(options, v) },
		get: func() string { return p.Get(options) },
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
	if def == "no" && words[0] == "yes" { // a flag without a value means yes
		f.NoOptDefVal = "yes"
	}
	c.Flags().SortFlags = false
	c.Flags().AddFlag(f)
	complete := cobra.NoFileCompletions
	switch {
	case strings.HasSuffix(name, "-file"):
		complete = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)
	case name == config.RuntimeDir.Name:
		complete = cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs)
	case len(words) > 0:
		complete = cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)
	}
	if err := c.RegisterFlagCompletionFunc(name, complete); err != nil {
		panic(err) // the flag has just been added
	}
}

// collectErrors makes the flags of c accept every value, and returns where the errors about values are collected.
func collectErrors(c *cobra.Command) *usageErrors {
	wrong := new(usageErrors)
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if v, ok := f.Value.(*flagValue); ok {
			set := v.set
			v.set = func(s string) error {
				if err := set(s); err != nil {
					*wrong = append(*wrong, valueError(err))
				}
				return nil
			}
		}
	})
	return wrong
}

// checkFlags sets the ipsec-secret of the environment in c, the tunnel that flags describe, and returns all that is
// wrong with it. wrong is what collectErrors has found.
func checkFlags(c *tunnel.Config, wrong usageErrors, given map[string]bool, lookup func(string) (string, bool)) error {
	if err := secretFromEnv(c, lookup); err != nil {
		wrong = append(wrong, err)
	}
	if len(wrong) == 0 || !given["remote-address"] {
		if len(wrong) > 0 { // a combination is only checked if each value is right
			*c = tunnel.Default()
		}
		if err := c.Validate(); err != nil {
			wrong = append(wrong, valueError(err))
		}
	}
	if len(wrong) > 0 {
		return wrong
	}
	return nil
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
	for _, p := range config.ProcessProperties() {
		row(&processRows, p.Name, p.Values, p.Default, p.Help)
	}
	const head = "| flag | values | default | meaning |\n| --- | --- | --- | --- |\n"
	return flagsIntroduction +
		"\n## Tunnel\n\n" + head + tunnelRows.String() +
		"\n## Encryption\n\n" + head + ipsecRows.String() +
		"\n## Process\n\n" + head + "| `--" + configFlag + "` | file or folder, repeatable | none | " + configHelp + " |\n" + processRows.String()
}

const flagsIntroduction = `# Flags of ipipd up

<!-- Written by "make docs" from the program's own tables: do not edit. -->

` + "`--flag value` and `--flag=value` are the same. The commands that talk to a process take `--runtime-dir`,\n" +
	"`ipipd print`, `check`, `diff` and `doctor` `--json`, and `ipipd doctor` all flags here. For `ipipd set` and `add` a flag of a tunnel is an argument without dashes,\n" +
	"`mtu=1400`; in a [configuration](configuration.md) it is a key, and beside `--config` it is refused.\n"

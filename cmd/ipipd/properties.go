package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"ipipd/internal/config"
	"ipipd/internal/tunnel"
)

// newTopicProperties returns the topic that `ipipd help properties` shows.
func newTopicProperties() *cobra.Command {
	return &cobra.Command{
		Use:   "properties",
		Short: "Every property of a tunnel: values, default, and whether a change interrupts it",
		Long:  propertyTopic(),
	}
}

// propertyTopic returns the help of all properties of a tunnel and of the process.
func propertyTopic() string {
	var b strings.Builder
	b.WriteString(`The properties of a tunnel: the flags of ipipd up behind their --, and the keys of a
configuration. A change by ipipd reload is in place, without the loss of a packet, or
the interface is removed and made again.
`)
	for _, p := range tunnel.Properties() {
		b.WriteString("\n" + propertyHelp(p.Name))
	}
	b.WriteString("\nThe properties of the process:\n")
	for _, p := range config.ProcessProperties() {
		b.WriteString("\n" + propertyHelp(p.Name))
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// propertyHelp returns the help of one property, of a tunnel or of the process; "" if there is none of that name.
func propertyHelp(name string) string {
	for _, p := range tunnel.Properties() {
		if p.Name == name {
			return propertyText(p.Name, p.Values, p.Default, changeOf(p), p.Help)
		}
	}
	if name == config.DisabledKey { // of a configuration, set and add
		return propertyText(name, "yes or no", "no", "the interface is removed, or made", config.DisabledHelp)
	}
	for _, p := range config.ProcessProperties() {
		if p.Name == name {
			return propertyText(p.Name, p.Values, p.Default, processChange, p.Help)
		}
	}
	return ""
}

func propertyText(name, values, def, change, help string) string {
	text := "  " + name + "\n"
	for _, line := range []string{help, "values: " + values, "default: " + def, "change: " + change} {
		for _, wrapped := range wrap(strings.ReplaceAll(line, "`", ""), 92) {
			text += "      " + wrapped + "\n"
		}
	}
	return text
}

const processChange = "when the process is started again"

// changeOf says what a change of p does to a tunnel that runs.
func changeOf(p tunnel.Property) string {
	change := "in place"
	if strings.HasPrefix(p.Name, "ipsec-") {
		change = "in place, and the ends negotiate anew: nothing is carried until then"
	}
	switch {
	case p.Name == "name":
		return "another tunnel: the name tells them apart"
	case strings.HasPrefix(p.Remade, "always"):
		return "made again " + p.Remade
	case p.Remade != "":
		return "made again " + p.Remade + "; otherwise " + change
	}
	return change
}

// changeTable returns a table of docs/configuration.md: the properties that are not simply changed in place.
func changeTable() string {
	var changes []string
	names := map[string][]string{}
	for _, p := range tunnel.Properties() {
		change := changeOf(p)
		if change == "in place" {
			continue
		}
		if names[change] == nil {
			changes = append(changes, change)
		}
		names[change] = append(names[change], "`"+p.Name+"`")
	}
	table := "| property | a change of it is |\n| --- | --- |\n"
	for _, change := range changes {
		table += fmt.Sprintf("| %s | %s |\n", strings.Join(names[change], ", "), change)
	}
	return table + "| every other | in place |\n"
}

// wrap breaks text into lines of up to width bytes, as far as its words allow. Lines after the first are indented.
func wrap(text string, width int) (lines []string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			lines = append(lines, line)
			line = "  "
		} else if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}

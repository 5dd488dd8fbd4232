package main

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ipipd/internal/tunnel"
)

// docs/flags.md is the output of flagTable. With UPDATE_DOCS set (make docs) the test
// writes it.
func TestFlagTable_docs(t *testing.T) {
	const file = "../../docs/flags.md"
	if os.Getenv("UPDATE_DOCS") != "" {
		if err := os.WriteFile(file, []byte(flagTable()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		t.Skip("there is no docs/flags.md") // the package is tested without the tree
	}
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(text), flagTable()); d != "" {
		t.Errorf("docs/flags.md is not what the flags are: run make docs\n%s", d)
	}
}

// docs/configuration.md has the changeTable.
func TestChangeTable_docs(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	if os.IsNotExist(err) {
		t.Skip("there is no docs/configuration.md") // the package is tested without the tree
	}
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "\n"+changeTable()) {
		t.Errorf("docs/configuration.md is not what a change does: want\n%s", changeTable())
	}
}

// The topic has every property, of the process, too.
func TestPropertyTopic(t *testing.T) {
	topic := propertyTopic()
	for _, p := range tunnel.Properties() {
		if !strings.Contains(topic, "\n  "+p.Name+"\n") {
			t.Errorf("%s is not in it", p.Name)
		}
	}
	for line := range strings.Lines(topic) {
		if len(line) > 101 && strings.Contains(strings.TrimSpace(line), " ") {
			t.Errorf("wider than 100 columns: %s", line)
		}
	}
}

package main

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
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

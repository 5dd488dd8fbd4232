package config

import (
	"os"
	"strings"
	"testing"
)

// The example in docs/configuration.md is read without an error, and the errors shown there are those of their file.
func TestRead_documented(t *testing.T) {
	text, err := os.ReadFile("../../docs/configuration.md")
	if os.IsNotExist(err) {
		t.Skip("there is no docs/configuration.md") // the package is tested without the tree
	}
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(text), "```yaml a /etc/ipipd/ipipd.yaml\n")
	example, _, _ = strings.Cut(example, "```\n")
	dir := write(t, map[string]string{
		"example.yaml": example,
		"ipipd.yaml":   "tunnels:\n- name: ipip1\n  remote-adress: 198.51.100.1\n  mtu: 9000000\n",
	})
	if file, _, err := Read(dir + "/example.yaml"); err != nil || len(file.Tunnels) != 2 {
		t.Errorf("the example: %v, %v, want two tunnels", file, err)
	}
	for line := range strings.Lines(wrong(t, dir, dir+"/ipipd.yaml")) {
		if !strings.Contains(string(text), "\n"+strings.TrimSpace(line)+"\n") {
			t.Errorf("not documented so: %s", line)
		}
	}
}

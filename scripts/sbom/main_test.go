package main

import (
	"runtime/debug"
	"testing"
)

func TestBOM(t *testing.T) {
	d := bom(&debug.BuildInfo{GoVersion: "go1.26.8", Main: debug.Module{Path: "ipipd"}, Deps: []*debug.Module{
		{Path: "a.example/a", Version: "v1.0.0", Replace: &debug.Module{Path: "a.example/b", Version: "v2.0.0"}},
	}}, "1.2.3")
	if got := d.Metadata.Component.PURL; got != "pkg:golang/ipipd@1.2.3" {
		t.Error(got)
	}
	if len(d.Components) != 2 || d.Components[0].PURL != "pkg:golang/std@1.26.8" || d.Components[1].PURL != "pkg:golang/a.example/b@v2.0.0" {
		t.Errorf("%+v", d.Components)
	}
}

package main

import (
	"runtime/debug"
	"testing"
)

func TestVersionText(t *testing.T) {
	info := &debug.BuildInfo{
		Settings: []debug.BuildSetting{{Key: "CGO_ENABLED", Value: "0"}, {Key: "GOARCH", Value: "amd64"}, {Key: "GOAMD64", Value: "v1"}, {Key: "vcs.revision", Value: "0123abc"}},
		Deps:     []*debug.Module{{Path: "a.example/a", Version: "v1.0.0"}, {Path: "a.example/b", Version: "v2.0.0", Replace: &debug.Module{Path: "a.example/c", Version: "v3.0.0"}}},
	}
	want := versionLine() + "\ncommit: 0123abc\nbuild: CGO_ENABLED=0\nbuild: GOAMD64=v1\nmodule: a.example/a v1.0.0\nmodule: a.example/c v3.0.0\n"
	if got := versionText(info); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	commit = "fedc"
	defer func() { commit = "" }()
	if got, want := versionText(nil), versionLine()+"\ncommit: fedc\n"; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

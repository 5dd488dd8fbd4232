package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// version and commit are set by the linker: -ldflags "-X main.version=v1.2.3 -X main.commit=0123abc".
var version, commit string

func newCmdVersion(s *streams) *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		Short:             "Say which ipipd this is, and what was compiled in",
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			info, _ := debug.ReadBuildInfo()
			_, err := fmt.Fprint(s.out, versionText(info))
			return err
		},
	}
}

// versionLine returns what `--version` prints, and the first line of versionText.
func versionLine() string {
	return fmt.Sprintf("ipipd %s %s %s/%s", versionString(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// versionText returns what `version` prints: versionLine, the commit, the settings of the build and the
// modules that were compiled in. info may be nil.
func versionText(info *debug.BuildInfo) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\ncommit: %s\n", versionLine(), commitString(info))
	if info == nil {
		return b.String()
	}
	for _, s := range info.Settings {
		if s.Value != "" && (strings.HasPrefix(s.Key, "GO") && s.Key != "GOOS" && s.Key != "GOARCH" || s.Key == "CGO_ENABLED" || s.Key == "-tags" || s.Key == "-race") {
			fmt.Fprintf(&b, "build: %s=%s\n", s.Key, s.Value)
		}
	}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		fmt.Fprintf(&b, "module: %s %s\n", m.Path, m.Version)
	}
	return b.String()
}

// commitString returns commit, or else what a build inside a repository leaves in the binary.
func commitString(info *debug.BuildInfo) string {
	if commit != "" {
		return commit
	}
	if info != nil {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}

// versionString returns version, or else the module version that `go install
// ipipd/cmd/ipipd@VERSION` or a build inside a repository leaves in the binary.
func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

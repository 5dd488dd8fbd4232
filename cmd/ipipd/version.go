package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker: -ldflags "-X main.version=v1.2.3".
var version string

func newCmdVersion(s *streams) *cobra.Command {
	return &cobra.Command{
		Use:               "version",
		Short:             "Say which ipipd this is",
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(s.out, versionLine())
			return err
		},
	}
}

// versionLine returns what `version` and `--version` print.
func versionLine() string {
	return fmt.Sprintf("ipipd %s %s %s/%s", versionString(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
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

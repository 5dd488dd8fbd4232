package main

import (
	"github.com/spf13/cobra"

	"ipipd/internal/config"
)

func newCmdSchema(s *streams) *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "Print the JSON Schema of a configuration, for editors",
		Long: `schema prints the JSON Schema (draft 7) of a configuration in YAML or JSON. An
editor with a YAML language server then completes keys and marks unknown ones:

  ipipd schema > ipipd.schema.json

and in the first line of the configuration

  # yaml-language-server: $schema=ipipd.schema.json`,
		Args:              noArguments,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			_, err := s.out.Write(config.Schema())
			return err
		},
	}
}

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"ipipd/internal/config"
	"ipipd/internal/control"
	"ipipd/internal/tunnel"
)

// usageError is a wrong command line: exit status 2, as for config.Errors, also of the process that was asked. Every
// other error is a failure: exit status 1.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func usageErrorf(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

func asUsage(err error) error {
	var already *usageError
	if errors.As(err, &already) {
		return err
	}
	return &usageError{err}
}

// usageErrors are all that is wrong with a command line: a line each.
type usageErrors []error

func (e usageErrors) Error() string   { return errors.Join(e...).Error() }
func (e usageErrors) Unwrap() []error { return e }

// usageLines returns a usage error for each line of text.
func usageLines(text string) (all usageErrors) {
	for line := range strings.Lines(text) {
		all = append(all, usageErrorf("%s", strings.TrimSpace(line)))
	}
	return all
}

// statusError is the exit status of a command that has already said why.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func isStatusError(err error) bool { return errors.As(err, new(statusError)) }

func exitStatus(err error) int {
	var status statusError
	if errors.As(err, &status) {
		return int(status)
	}
	var usage *usageError
	var wrong config.Errors
	var refused *control.Refusal
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usage), errors.As(err, &wrong), errors.As(err, &refused) && refused.Input:
		return 2
	}
	return 1
}

// oneLine returns the message of err on one line, without control characters.
func oneLine(err error) string {
	s := strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

// valueError turns a *tunnel.ValueError into a usageError that names the flag.
func valueError(err error) error {
	var v *tunnel.ValueError
	switch {
	case !errors.As(err, &v):
		return err
	case v.Missing && v.Property == "remote-address":
		return usageErrorf("--%w; the smallest tunnel is %s", v, minimalExample)
	}
	return usageErrorf("--%w", v)
}

// flagError turns an error of pflag into one that names the flag, the value given and the
// values accepted.
func flagError(c *cobra.Command, err error) error {
	var (
		invalid  *pflag.InvalidValueError
		missing  *pflag.ValueRequiredError
		unknown  *pflag.NotExistError
		value    *tunnel.ValueError
		accepted = func(f *pflag.Flag) string {
			if a := f.Annotations[acceptedAnnotation]; len(a) > 0 {
				return a[0]
			}
			switch f.Value.Type() {
			case "bool":
				return "true or false"
			case "duration":
				return "a time such as 30s"
			case "int", "uint64":
				return "a number"
			}
			return "a value"
		}
	)
	switch {
	case errors.As(err, &value):
		return valueError(err)
	case errors.As(err, &invalid):
		return usageErrorf("--%s: %q is not accepted: want %s", invalid.GetFlag().Name, invalid.GetValue(), accepted(invalid.GetFlag()))
	case errors.As(err, &missing):
		return usageErrorf("--%s: no value given: want %s", missing.GetFlag().Name, accepted(missing.GetFlag()))
	case errors.As(err, &unknown):
		if letters := unknown.GetSpecifiedShortnames(); letters != "" {
			return usageErrorf("-%s: unknown flag: %s takes --%s", letters, c.CommandPath(), strings.Join(flagNames(c), " --"))
		}
		name := unknown.GetSpecifiedName()
		if strings.Contains(c.Use, " PROPERTY=VALUE") && slices.ContainsFunc(tunnel.Properties(), func(p tunnel.Property) bool { return p.Name == name }) {
			return usageErrorf("--%s: unknown flag: want it without dashes, %s=VALUE", name, name)
		}
		if near := config.Suggest(name, flagNames(c)); near != "" {
			return usageErrorf("--%s: unknown flag: did you mean --%s?", name, near)
		}
		return usageErrorf("--%s: unknown flag: %s takes --%s", name, c.CommandPath(), strings.Join(flagNames(c), " --"))
	}
	return asUsage(err)
}

func flagNames(c *cobra.Command) (names []string) {
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, f.Name)
		}
	})
	return names
}

// withRemedy appends remedies to an error of a system call, and another one if a permission is missing.
func withRemedy(err error, remedies ...string) error {
	if errors.Is(err, fs.ErrPermission) {
		remedies = append(slices.Clone(remedies), "run it as root, or with sudo")
	}
	if len(remedies) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, strings.Join(remedies, ", or "))
}

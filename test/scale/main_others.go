//go:build !linux

package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "scale: it measures network namespaces of Linux")
	os.Exit(1)
}

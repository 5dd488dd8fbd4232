// Ipipd is a userspace daemon for RFC 2003 IP-in-IP tunnels: see `ipipd help`.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], &streams{os.Stdout, os.Stderr}))
}

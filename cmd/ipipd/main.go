// Ipipd brings up RFC 2003 IP-in-IP tunnels in user space. `ipipd help` says how.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], &streams{os.Stdout, os.Stderr}))
}

// Package demo is `ipipd demo`: it makes hosts and cables of package lab, runs this program on each host, and shows
// what happens. It needs Linux and root. What it makes is gone when Run returns, and when the process is killed, but for a
// folder of temporary files then.
package demo

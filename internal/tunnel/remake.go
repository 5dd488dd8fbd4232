package tunnel

import (
	"errors"
	"fmt"
	"time"

	"ipipd/internal/netstate"
	"ipipd/internal/warning"
	"ipipd/tun"
)

// An interface that somebody deletes, or that goes with the network namespace that it was moved to, is made
// again. All else of the tunnel stays meanwhile: its route, its SAs, its keepalive, its counters.

const (
	// maxRemakes is how often in a row, with less than remakeWindow between two, an interface is made
	// again at once. From then on that is done after lastRemake.
	maxRemakes   = 5
	remakeWindow = time.Minute
	// firstRemake is the time until an interface that could not be made is tried again. It doubles each
	// time, up to lastRemake.
	firstRemake, lastRemake = time.Second, 30 * time.Second
)

// lostInterface is what control knows of an interface that is gone.
type lostInterface struct {
	gone  bool
	since time.Time     // when it was last lost
	times int           // how often it was lost in a row
	at    time.Time     // when it is to be made again
	wait  time.Duration // from the last failed try to at
}

// interfaceGone is called when a queue of a device cannot be read any more.
func (c *control) interfaceGone(device tun.Device, err error, now time.Time) {
	lost := &c.lost
	if lost.gone || device != c.device { // another queue has reported it
		return
	}
	c.setMissing("interface " + c.madeName + ", which was deleted")
	c.closeInterface()
	if now.Sub(lost.since) > remakeWindow {
		lost.times = 0
	}
	*lost = lostInterface{gone: true, since: now, times: lost.times + 1, at: now}
	detail := err.Error()
	if lost.times > maxRemakes {
		lost.at = now.Add(lastRemake)
		detail = fmt.Sprintf("%d times within minutes, so after %v: %v", lost.times, lastRemake, err)
	}
	c.raise(warning.InterfaceGone, detail, "")
	clear(c.restoreCounts)
}

func (c *control) setMissing(text string) { c.missing.Store(&text) }

// closeInterface closes what is left of the interface, and disables the fast path, which would lose packets uncounted.
func (c *control) closeInterface() {
	c.disableFastPath()
	c.attachAt = time.Time{}
	for _, stop := range c.stop { // before the file descriptors are closed
		stop()
	}
	c.stop, c.keys = nil, nil
	c.dropDevice()
	_ = c.device.Close()
	c.iface.Store(&tun.State{Name: c.madeName})
	c.ifindex = 0
	c.answer = c.follower.Set(c.query())
}

// remakeInterface makes the interface again, if it is time to.
func (c *control) remakeInterface(now time.Time) {
	lost := &c.lost
	if now.Before(lost.at) {
		return
	}
	lost.gone = false
	err := c.openInterface()
	if err == nil {
		err = c.reconfigure()
	}
	if err == nil {
		c.missing.Store(nil)
		c.restoreDue = true // its routes
		c.countRestored("interface", 1)
		c.clear(warning.InterfaceGone)
		c.clear(warning.InterfaceNotMade)
		return
	}
	c.closeInterface()
	lost.gone = true
	c.raise(warning.InterfaceNotMade, err.Error(), "")
	if errors.Is(err, tun.ErrNameTaken) {
		c.setMissing("the name " + c.madeName + ", which another interface has")
	}
	lost.wait = min(max(2*lost.wait, firstRemake), lastRemake)
	lost.at = now.Add(lost.wait)
}

// reconfigure gives the interface what it had, but for its routes, and has the workers read its queues.
func (c *control) reconfigure() error {
	again := netstate.Interface{Index: c.ifindex, AltName: altName(c.cfg.Name), Addresses: c.cfg.Addresses, Program: c.encapProgram()}
	if err := c.engine.network.Configure([]netstate.Interface{again}); err != nil {
		return err
	}
	if c.cfg.RPS != "" {
		c.setRPS()
	}
	c.addQueues()
	if err := c.readInterface(); err != nil {
		return err
	}
	return c.engine.watchAll([]*control{c})
}

// interfacePresent reports whether the interface is there, and in the network namespace of the Engine.
func (c *control) interfacePresent() bool { return !c.lost.gone && !c.iface.Load().Moved }

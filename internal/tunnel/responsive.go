package tunnel

import "time"

// Unresponsive returns the name of a tunnel whose control goroutine does not run an event within that time; "" if all
// do. While Apply holds control goroutines they do not, and nothing is wrong.
func (e *Engine) Unresponsive(within time.Duration) string {
	late := time.NewTimer(within)
	defer late.Stop()
	answers := map[string]chan struct{}{}
	tunnels := e.Tunnels()
	for name, t := range tunnels {
		answer := make(chan struct{})
		select {
		case t.events <- func(*control) { close(answer) }:
			answers[name] = answer
		case <-t.ctx.Done():
		case <-late.C:
			return name
		}
	}
	for name, answer := range answers {
		select {
		case <-answer:
		case <-tunnels[name].ctx.Done():
		case <-late.C:
			return name
		}
	}
	return ""
}

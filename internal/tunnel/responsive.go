package tunnel

import "time"

// Unresponsive returns the name of a tunnel whose control goroutine runs nothing that it is sent within that time,
// "" if there is none. While Apply holds some of them that is no sign of anything.
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

package tunnel

import "context"

// Start starts a tunnel beside those that run, unless ctx is done, without a list of them all as Apply
// takes it. On error nothing is left behind.
func (e *Engine) Start(ctx context.Context, cfg Config) (*Tunnel, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	secret, err := cfg.IPsec.secret()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	c := e.newControl(cfg.clone(), secret)
	if err := e.start(c); err != nil {
		return nil, err
	}
	return c.Tunnel, nil
}

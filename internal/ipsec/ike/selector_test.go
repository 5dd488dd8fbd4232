package ike

import "testing"

// Only SAs for protocol 4, or any, between the two addresses are accepted.
func TestV1SAValidSelectors(t *testing.T) {
	host := func(protocol byte, ip ...byte) payload {
		return payload{kind: v1Identification, body: append([]byte{idIPv4, protocol, 0, 0}, ip...)}
	}
	subnet := func(bits byte) payload {
		return payload{kind: v1Identification, body: []byte{idIPv4Subnet, 4, 0, 0, 198, 51, 100, 1, 255, 255, 255, bits}}
	}
	us, them := host(4, 192, 0, 2, 1), host(4, 198, 51, 100, 1)
	for name, c := range map[string]struct {
		ids  []payload
		nat  nat
		want bool
	}{
		"none":                  {nil, nat{}, true},
		"ours":                  {[]payload{them, us}, nat{}, true},
		"the wrong way round":   {[]payload{us, them}, nat{}, false},
		"any protocol":          {[]payload{host(0, 198, 51, 100, 1), us}, nat{}, true},
		"another protocol":      {[]payload{host(17, 198, 51, 100, 1), us}, nat{}, false},
		"another address":       {[]payload{host(4, 198, 51, 100, 2), us}, nat{}, false},
		"behind a NAT":          {[]payload{host(4, 10, 0, 0, 7), us}, nat{remote: true}, true},
		"behind our NAT":        {[]payload{host(4, 10, 0, 0, 7), us}, nat{local: true}, false},
		"we, behind a NAT":      {[]payload{them, host(4, 203, 0, 113, 9)}, nat{local: true}, true},
		"we, behind its NAT":    {[]payload{them, host(4, 203, 0, 113, 9)}, nat{remote: true}, false},
		"a network of one":      {[]payload{subnet(255), us}, nat{}, true},
		"a network of two":      {[]payload{subnet(254), us}, nat{}, false},
		"one":                   {[]payload{them}, nat{}, false},
		"three":                 {[]payload{them, us, us}, nat{}, false},
		"short":                 {[]payload{them, {kind: v1Identification, body: []byte{1}}}, nat{}, false},
		"a network behind NATs": {[]payload{subnet(0), us}, nat{remote: true}, false},
	} {
		s := &v1SA{p: &Peer{cfg: Config{Local: addressA, Remote: addressB}}, nat: c.nat}
		if got := s.validSelectors(c.ids); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestTSIncludes(t *testing.T) {
	ip := [4]byte{192, 0, 2, 1}
	ts := func(protocol, low, high byte) []byte {
		return []byte{1, 0, 0, 0, 7, protocol, 0, 16, 0, 0, 255, 255, 192, 0, 2, low, 192, 0, 2, high}
	}
	ports := ts(4, 1, 1)
	ports[11] = 80
	for name, c := range map[string]struct {
		b    []byte
		any  bool
		want bool
	}{
		"ours":              {trafficSelector(ip), false, true},
		"wider":             {ts(0, 0, 255), false, true},
		"beside":            {ts(4, 2, 9), false, false},
		"another":           {ts(4, 2, 2), false, false},
		"another, with NAT": {ts(4, 2, 2), true, true},
		"others, with NAT":  {ts(4, 2, 9), true, false},
		"another protocol":  {ts(17, 1, 1), false, false},
		"ports":             {ports, false, false},
		"second of two":     {append(append([]byte{2, 0, 0, 0}, ts(17, 1, 1)[4:]...), ts(4, 1, 1)[4:]...), false, true},
		"cut":               {ts(4, 1, 1)[:15], false, false},
		"empty":             {nil, false, false},
	} {
		if _, got := tsIncludes(c.b, ip, c.any); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

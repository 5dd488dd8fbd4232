package fastpath

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
)

// The map keys and values are declared twice, in C and in Go. The object's BTF has the
// layout of the C structs.
func TestObject_mapLayouts(t *testing.T) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]struct{ key, value any }{
		"tx_tunnels": {uint32(0), txTunnel{}},
		"rx_tunnels": {rxKey{}, rxTunnel{}},
		"counters":   {uint32(0), counters{}},
		"ip_ids":     {uint32(0), uint32(0)},
		"slots":      {uint32(0), slotEntry{}},

		"tx_fib":      {uint32(0), routeBucket{}},
		"tx_lengths":  {uint32(0), uint64(0)},
		"numbers":     {remoteKey{}, uint32(0)},
		"remotes":     {uint32(0), remoteValue{}},
		"accept_from": {prefixKey{}, uint32(0)},
		"accept_to":   {prefixKey{}, uint32(0)},

		"local_addresses": {[4]byte{}, uint32(0)},
	} {
		m := spec.Maps[name]
		if m == nil {
			t.Errorf("the object has no map %s", name)
			continue
		}
		sameLayout(t, name+": key", m.Key, reflect.TypeOf(want.key))
		sameLayout(t, name+": value", m.Value, reflect.TypeOf(want.value))
		if int(m.KeySize) != int(reflect.TypeOf(want.key).Size()) || int(m.ValueSize) != int(reflect.TypeOf(want.value).Size()) {
			t.Errorf("%s: keys of %d bytes and values of %d", name, m.KeySize, m.ValueSize)
		}
		delete(spec.Maps, name)
	}
	if m := spec.Maps["capture_rings"]; m == nil || m.KeySize != 4 || m.InnerMap == nil || m.InnerMap.Type != ebpf.RingBuf {
		t.Errorf("capture_rings: %v", m)
	}
	delete(spec.Maps, "capture_rings")
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") { // .rodata: link_header
			t.Errorf("map %s has no Go mirror: %v", name, m)
		}
	}
}

// sameLayout compares a C type with its Go mirror: size, and each member's name, offset
// and size.
func sameLayout(t *testing.T, what string, c btf.Type, g reflect.Type) {
	t.Helper()
	size, err := btf.Sizeof(c)
	if err != nil || size != int(g.Size()) {
		t.Errorf("%s: %d bytes in C (%v), %d in Go", what, size, err, g.Size())
	}
	s, ok := btf.UnderlyingType(c).(*btf.Struct)
	if ok != (g.Kind() == reflect.Struct) {
		t.Errorf("%s: %v in C, %v in Go", what, c, g)
	}
	if !ok || g.Kind() != reflect.Struct {
		return
	}
	if len(s.Members) != g.NumField() {
		t.Errorf("%s: %d members in C, %d in Go", what, len(s.Members), g.NumField())
	}
	for i := range min(len(s.Members), g.NumField()) {
		m, f := s.Members[i], g.Field(i)
		size, err := btf.Sizeof(m.Type)
		if !strings.EqualFold(strings.ReplaceAll(m.Name, "_", ""), f.Name) ||
			int(m.Offset.Bytes()) != int(f.Offset) || err != nil || size != int(f.Type.Size()) {
			t.Errorf("%s: in C %s at %d, %d bytes (%v); in Go %s at %d, %d bytes", what,
				m.Name, m.Offset.Bytes(), size, err, f.Name, f.Offset, f.Type.Size())
		}
	}
}

// routeBucket is a value of the map tx_fib, which has no Go mirror: fibMap has all as words.
type routeBucket struct{ Routes [bucketRoutes]uint64 }

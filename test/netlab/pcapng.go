package netlab

import (
	"encoding/binary"
	"fmt"
)

// CaptureFile is what ReadCapture finds in a pcapng file.
type CaptureFile struct {
	Comment    string // of the section
	Interfaces []CaptureInterface
	Packets    []CapturedPacket
	Names      map[[4]byte]string
	// Ended is whether there is an Interface Statistics Block for each interface.
	Ended bool
}

// CaptureInterface is an interface of a file, and its statistics.
type CaptureInterface struct {
	Name, Description string
	LinkType          uint16
	Delivered, Missed uint64
	ended             bool
}

// CapturedPacket is an Enhanced Packet Block.
type CapturedPacket struct {
	Interface string
	Packet    []byte
	Length    int    // of the whole packet; Packet may have less of it
	Direction string // "in" or "out"
	ID        uint64
	Comment   string
	Missed    uint64 // packets missing before it
}

// ReadCapture reads a pcapng file in little-endian as `ipipd capture` writes it. A block that is cut off at
// the end is left out.
func ReadCapture(file []byte) (c *CaptureFile, err error) {
	c = &CaptureFile{Names: map[[4]byte]string{}}
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a block is not as it must be: %v", r)
		}
	}()
	le := binary.LittleEndian
	for len(file) >= 12 {
		kind, n := le.Uint32(file), int(le.Uint32(file[4:]))
		if n < 12 || n%4 != 0 {
			return c, fmt.Errorf("a block of type %#x is %d bytes long", kind, n)
		}
		if n > len(file) {
			break
		}
		if again := int(le.Uint32(file[n-4:])); again != n {
			return c, fmt.Errorf("a block of type %#x is %d bytes long, and says %d at its end", kind, n, again)
		}
		body := file[8 : n-4]
		file = file[n:]
		switch kind {
		case 0x0a0d0d0a:
			if magic := le.Uint32(body); magic != 0x1a2b3c4d {
				return c, fmt.Errorf("the byte-order magic is %#x", magic)
			}
			c.Comment = string(captureOptions(body[16:])[1])
		case 1:
			o := captureOptions(body[8:])
			c.Interfaces = append(c.Interfaces, CaptureInterface{Name: string(o[2]), Description: string(o[3]), LinkType: le.Uint16(body)})
		case 4:
			for r := body; le.Uint16(r) != 0; {
				n := int(le.Uint16(r[2:]))
				c.Names[[4]byte(r[4:8])] = string(r[8 : 4+n-1])
				r = r[4+(n+3)&^3:]
			}
		case 5:
			o := captureOptions(body[12:])
			i := &c.Interfaces[le.Uint32(body)]
			i.Delivered, i.Missed, i.ended = le.Uint64(o[8]), le.Uint64(o[5]), true
		case 6:
			kept := int(le.Uint32(body[12:]))
			o := captureOptions(body[20+(kept+3)&^3:])
			p := CapturedPacket{
				Interface: c.Interfaces[le.Uint32(body)].Name, Packet: body[20:][:kept], Length: int(le.Uint32(body[16:])),
				Direction: map[uint32]string{1: "in", 2: "out"}[le.Uint32(o[2])], Comment: string(o[1]),
			}
			if id := o[5]; id != nil {
				p.ID = le.Uint64(id)
			}
			if missed := o[4]; missed != nil {
				p.Missed = le.Uint64(missed)
			}
			c.Packets = append(c.Packets, p)
		default:
			return c, fmt.Errorf("a block is of type %#x", kind)
		}
	}
	c.Ended = len(c.Interfaces) > 0
	for _, i := range c.Interfaces {
		c.Ended = c.Ended && i.ended
	}
	return c, nil
}

// captureOptions returns the options of a block by code.
func captureOptions(b []byte) map[uint16][]byte {
	o := map[uint16][]byte{}
	for len(b) >= 4 {
		code, n := binary.LittleEndian.Uint16(b), int(binary.LittleEndian.Uint16(b[2:]))
		if code == 0 {
			break
		}
		o[code] = b[4 : 4+n]
		b = b[4+(n+3)&^3:]
	}
	return o
}

// Interface returns the interface of that name; nil if there is none.
func (c *CaptureFile) Interface(name string) *CaptureInterface {
	for i := range c.Interfaces {
		if c.Interfaces[i].Name == name {
			return &c.Interfaces[i]
		}
	}
	return nil
}

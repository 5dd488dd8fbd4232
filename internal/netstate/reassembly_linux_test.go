package netstate

import "testing"

func TestParseReassembly(t *testing.T) {
	const snmp = "Ip: Forwarding DefaultTTL ReasmTimeout ReasmReqds ReasmOKs ReasmFails FragOKs\n" +
		"Ip: 1 64 3 900 20 4 7\nIcmp: InMsgs\nIcmp: 3\n"
	if done, failed, err := parseReassembly(snmp); done != 20 || failed != 4 || err != nil {
		t.Errorf("%d done, %d failed, %v: want 20, 4", done, failed, err)
	}
	for _, bad := range []string{"", "Ip: ReasmOKs\n", "Ip: ReasmOKs\nIp: x\n"} {
		if done, failed, err := parseReassembly(bad); err == nil {
			t.Errorf("%q: %d done, %d failed", bad, done, failed)
		}
	}
}

func TestRequester_Reassembly(t *testing.T) {
	if _, _, err := fresh.Reassembly(); err != nil {
		t.Error(err)
	}
}

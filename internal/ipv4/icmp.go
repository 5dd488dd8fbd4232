package ipv4

// ICMP types (RFC 792).
const (
	ICMPEchoReply        = 0
	ICMPUnreachable      = 3
	ICMPSourceQuench     = 4
	ICMPRedirect         = 5
	ICMPEchoRequest      = 8
	ICMPTimeExceeded     = 11
	ICMPParameterProblem = 12
)

// Codes of ICMPUnreachable.
const (
	CodeHostUnreachable     = 1
	CodeProtocolUnreachable = 2
	CodePortUnreachable     = 3
	CodeTooBig              = 4 // fragmentation needed and DF set
	CodeSourceRouteFailed   = 5
)

// ICMPHeaderLen is the length in bytes of what precedes an error's quote, or an echo's data.
const ICMPHeaderLen = 8

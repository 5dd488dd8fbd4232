package ipv4

import "testing"

// Without AVX2 the sums are the same.
func TestSum_withoutAVX2(t *testing.T) {
	if !haveAVX2 {
		t.Skip("this processor has no AVX2: the other tests cover that")
	}
	haveAVX2 = false
	defer func() { haveAVX2 = true }()
	t.Run("every length", TestSum)
	t.Run("RFC 1071", TestSum_rfc1071)
}

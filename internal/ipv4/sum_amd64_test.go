package ipv4

import "testing"

// Of a processor without AVX2 nothing else is asked.
func TestSumsAreTheSameWithoutVectors(t *testing.T) {
	if !vectors {
		t.Skip("this processor has no AVX2: the other tests are about that already")
	}
	vectors = false
	defer func() { vectors = true }()
	t.Run("every length", TestSumOfEveryLengthAndAlignment)
	t.Run("RFC 1071", TestSumHasTheResultOfRFC1071)
}

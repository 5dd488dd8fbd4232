package config

// Suggest returns which of names is the closest to the misspelt name, or "" if none is close.
func Suggest(misspelt string, names []string) (near string) {
	best := 3 // exclusive
	for _, name := range names {
		if d := levenshtein(misspelt, name); d < best && d < len(name)/2 {
			best, near = d, name
		}
	}
	return near
}

// levenshtein returns the edit distance in bytes.
func levenshtein(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			above := row[j+1]
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			row[j+1] = min(cost, above+1, row[j]+1)
			diagonal = above
		}
	}
	return row[len(b)]
}

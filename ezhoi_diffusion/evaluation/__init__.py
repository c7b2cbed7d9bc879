"""What a bridge is worth: average precision, the comparison of variants, pictures. Knows no host."""

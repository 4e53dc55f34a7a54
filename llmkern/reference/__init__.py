"""The specification of every op in plain torch; runs in float64, on any device, without compilers."""

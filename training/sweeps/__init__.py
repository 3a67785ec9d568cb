"""Many runs: studies, populations, Ray."""

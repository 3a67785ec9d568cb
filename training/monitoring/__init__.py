"""What a run logs: metrics, throughput, profiles, backends."""

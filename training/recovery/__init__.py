"""What happens at non-finite steps, loss spikes and stops."""

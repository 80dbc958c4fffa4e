"""From nothing to a federation over several machines: certificates, keys, commands, and a doctor that looks at what is there."""

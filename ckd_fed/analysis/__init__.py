"""What finished (or broken off) runs left on disk: finding them, reading them, comparing them."""

"""The Flower ClientApps: teacher nodes and student workers, and the workspace each keeps on its own disk. No mathematics here."""

"""The Flower ServerApp: enrolment, rounds, exchange and the run's record. It holds no features and trains nothing."""

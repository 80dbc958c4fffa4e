#!/usr/bin/env bash
# Print this cluster's entry of Flower's configuration: bash connection.sh >> ~/.flwr/config.toml
set -eu
here="$(cd "$(dirname "$0")" && pwd | sed 's/["\\]/\\&/g')"
cat <<END
[superlink.lab]
address = "gpu0.example:8000"
root-certificates = "$here/ca.crt"
END

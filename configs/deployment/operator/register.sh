#!/usr/bin/env bash
# Register the nodes' keys, after the SuperLink has started and before the nodes do. The ids are kept for `ckd-fed doctor --cluster`.
set -eu
cd "$(dirname "$0")"
mkdir -p registered
for node in teacher-image teacher-text student-0 student-1; do
  if [ -s "registered/$node.json" ]; then echo "$node is registered"; continue; fi
  answer="$(flwr supernode register "keys/$node.pub" lab --name "$node" --format json)"
  echo "$node: $answer"
  case "$answer" in *node-id*) echo "$answer" > "registered/$node.json" ;; *) exit 1 ;; esac
done

#!/usr/bin/env bash
# Queue a request for a TPU slice whose hosts start Ray by themselves (startup.sh).
#
#   PROJECT=... ZONE=... IMAGE=... TOKEN_SECRET=... cluster/queued/create.sh NAME ACCELERATOR_TYPE [HEAD]
#
# ACCELERATOR_TYPE is v5litepod-16, v6e-16, v5p-16, ... HEAD is the address of another slice's head, to be one cluster
# with it. SERVICE_ACCOUNT and HF_SECRET may be set. The run's scaling_config of such a slice:
#
#   v5litepod-16   {use_tpu: true, topology: 4x4, accelerator_type: TPU-V5LITEPOD, num_workers: 4}
#   v6e-16         {use_tpu: true, topology: 4x4, accelerator_type: TPU-V6E, num_workers: 4}
#   v5p-16         {use_tpu: true, topology: 2x2x2, accelerator_type: TPU-V5P, num_workers: 2}
set -euo pipefail

if [[ $# -lt 2 ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 type=$2 head=${3:-}
: "${PROJECT:?} ${ZONE:?} ${IMAGE:?} ${TOKEN_SECRET:?}"

case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *)
    echo "$type: give v5litepod-N, v5p-N or v6e-N" >&2
    exit 2
    ;;
esac

metadata="kithara-ray-image=$IMAGE,kithara-ray-token-secret=$TOKEN_SECRET"
metadata+=${HF_SECRET:+,kithara-ray-hf-secret=$HF_SECRET}
metadata+=${head:+,kithara-ray-head=$head}
arguments=(
  --project "$PROJECT" --zone "$ZONE" --node-id "$name"
  --accelerator-type "$type" --runtime-version "$runtime"
  --metadata "$metadata" --metadata-from-file "startup-script=$(dirname "$0")/startup.sh"
)
if [[ -n ${SERVICE_ACCOUNT:-} ]]; then
  arguments+=(--service-account "$SERVICE_ACCOUNT")
fi
gcloud compute tpus queued-resources create "$name" "${arguments[@]}"

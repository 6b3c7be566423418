#!/usr/bin/env bash
# Start-up script of every host of a TPU slice: runs Ray in the image, its head on the slice's first host.
#
# Instance attributes (create.sh sets them):
#   kithara-ray-image          the image, in Artifact Registry
#   kithara-ray-token-secret   name of Secret Manager's secret that holds Ray's token
#   kithara-ray-hf-secret      the same of the Hugging Face token; may be absent
#   kithara-ray-head           address of another slice's head, to join it; absent where this slice has the head
set -euo pipefail
umask 077

attribute() {
  curl -fsS -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

optional() { attribute "$1" 2>/dev/null || true; }

secrets=${KITHARA_RAY_SECRETS:-/var/lib/kithara_ray}
mkdir -p "$secrets"
gcloud secrets versions access latest --secret="$(attribute kithara-ray-token-secret)" >"$secrets/ray_token"
hf_secret=$(optional kithara-ray-hf-secret)
if [[ -n $hf_secret ]]; then
  gcloud secrets versions access latest --secret="$hf_secret" >"$secrets/hf_token"
fi

image=$(attribute kithara-ray-image)
gcloud auth configure-docker "${image%%/*}" --quiet

# All hosts of the slice in their order, by commas: addresses, or name:id:address.
endpoints=$(attribute worker-network-endpoints)
first=${endpoints%%,*}
head=$(optional kithara-ray-head)
if [[ -z $head && $(attribute agent-worker-number) == 0 ]]; then
  # The dashboard, which takes jobs, listens on this host alone: reach it through ssh.
  role=(--head --port=6379 --dashboard-host=127.0.0.1)
else
  role=(--address="${head:-${first##*:}}:6379")
fi

docker rm --force ray 2>/dev/null || true # of an earlier boot
# Restarted until the head is there. Root: the TPU's device files belong to it.
docker run --detach --name ray --restart always --privileged --user root --net host --ipc host \
  --volume "$secrets:/run/secrets/kithara_ray:ro" \
  --env RAY_AUTH_MODE=token --env RAY_AUTH_TOKEN_PATH=/run/secrets/kithara_ray/ray_token \
  --env HF_TOKEN_PATH=/run/secrets/kithara_ray/hf_token \
  "$image" ray start --block "${role[@]}"

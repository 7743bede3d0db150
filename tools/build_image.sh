#!/usr/bin/env bash
# Builds docker/Dockerfile without a Docker engine: with buildah, on a base image from debootstrap.
#
#     tools/build_image.sh [--target release] [--backends "vllm-cpu"] [--tag nemo-rl:local] [--work DIR]
#         [--ca-bundle FILE]
#
# Needs root, the Debian packages `buildah` and `debootstrap`, and 100 GB of free disk. STORAGE_DRIVER=overlay needs less
# disk if the kernel supports it; the default, vfs, copies every layer. --ca-bundle adds certificates for the package
# index to the base image; use such images only for tests. Variables: DEBIAN_MIRROR (debootstrap's mirror), BUILD_VOLUMES
# (additional `--volume` arguments, such as the configuration of a package index).
# Covers every instruction of the Dockerfile, build arguments, all targets, and a run without root. Does not cover
# BuildKit, CUDA base images, or GPUs in a container.
set -euo pipefail
cd "$(dirname "$0")/.."

target=release backends="" tag=nemo-rl:local work=${TMPDIR:-/tmp}/nemo-rl-image certificates=""
while [ $# -gt 0 ]; do
    case $1 in
        --target) target=$2 ;;
        --backends) backends=$2 ;;
        --tag) tag=$2 ;;
        --work) work=$2 ;;
        --ca-bundle) certificates=$2 ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
for program in buildah debootstrap; do
    command -v "$program" >/dev/null || { echo "$program is missing: apt-get install $program" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root" >&2; exit 2; }

mkdir -p "$work"
export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs} BUILDAH_ISOLATION=chroot
buildah=(buildah --root "$work/storage" --runroot "$work/run")

if [ ! -e "$work/base/.complete" ]; then
    rm -rf "$work/base"
    debootstrap --variant=minbase bookworm "$work/base" ${DEBIAN_MIRROR:-}
    touch "$work/base/.complete"
fi
base=localhost/debian:base${certificates:+-certified}
if ! "${buildah[@]}" inspect --type image "$base" >/dev/null 2>&1; then
    container=$("${buildah[@]}" from scratch)
    "${buildah[@]}" add --quiet "$container" "$work/base" /
    if [ -n "$certificates" ]; then
        "${buildah[@]}" add --quiet "$container" "$certificates" /etc/build-ca.crt
        "${buildah[@]}" config --env SSL_CERT_FILE=/etc/build-ca.crt --env PIP_CERT=/etc/build-ca.crt "$container"
    fi
    "${buildah[@]}" commit --quiet --rm "$container" "$base"
fi
# shellcheck disable=SC2086
"${buildah[@]}" bud --format docker --layers=false --target "$target" --file docker/Dockerfile \
    --build-arg "BASE_IMAGE=$base" --build-arg "BACKENDS=$backends" \
    ${BUILD_VOLUMES:-} --tag "$tag" .

if [ "$target" = release ]; then
    container=$("${buildah[@]}" from "$tag")
    trap '"${buildah[@]}" rm "$container" >/dev/null' EXIT
    as_user() { "${buildah[@]}" run --user 1000:1000 --env HOME=/home/nemo "$container" -- "$@"; }
    as_user nemo-rl venvs list
    as_user nemo-rl doctor
    as_user python examples/run_grpo_math.py grpo.max_num_steps=2
fi
echo "built $tag ($target) in $work/storage"

#!/usr/bin/env bash
# From a folder of images and a plate map to a report (docs/howto/folder-to-table.md):
#   examples/folder_to_report.sh IMAGES MAP OUT [PATTERN]
# PATTERN describes the file names of microscopes that `perturbjax table` does not recognize. BUILD
# and TRAIN can contain further flags, for example BUILD="--segmenter watershed".
set -euo pipefail
images=$1 map=$2 out=$3 pattern=${4:-}

perturbjax table --images "$images" --platemap "$map" ${pattern:+--pattern "$pattern"} --out "$out/load_data.csv"
perturbjax inspect --load-data "$out/load_data.csv" --images "$images"
# shellcheck disable=SC2086
perturbjax build --load-data "$out/load_data.csv" --images "$images" --out "$out/dataset" ${BUILD:-}
# shellcheck disable=SC2086
perturbjax train --data "$out/dataset" --out "$out/run" ${TRAIN:-}
perturbjax evaluate --run "$out/run"
echo "Open $out/dataset/preview.html and $out/run/report.html in a browser."

// Build, train and evaluate one dataset, with one process for each step:
//   nextflow run examples/main.nf --load_data load_data.csv --images images
params.load_data = 'load_data.csv'
params.images = 'images'
params.preset = 'cells'

process BUILD {
    cpus 2

    input:
    path load_data
    path images

    output:
    path 'dataset'

    script:
    """
    perturbjax build --load-data ${load_data} --images ${images} --out dataset --aggregate none --segment-channels DNA --workers ${task.cpus}
    """
}

process TRAIN {
    input:
    path dataset

    output:
    path 'run'

    script:
    """
    perturbjax train --preset ${params.preset} --data ${dataset} --out run --split well
    """
}

process EVALUATE {
    publishDir 'results', mode: 'copy'

    input:
    path dataset
    path run, stageAs: 'trained'

    output:
    path 'evaluated'

    script:
    """
    cp -rL ${run} evaluated
    perturbjax evaluate --run evaluated --data ${dataset}
    """
}

workflow {
    dataset = BUILD(file(params.load_data), file(params.images))
    run = TRAIN(dataset)
    EVALUATE(dataset, run)
}

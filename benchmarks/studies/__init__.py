"""Studies on real data: what post-training does where it matters, against what people do today."""

from benchmarks.studies import driving, paper, public, repair, scale, targets
from benchmarks.studies.frame import Study

#: in the order of the results page
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (paper.STUDY, repair.STUDY, targets.STUDY, driving.STUDY, scale.STUDY, public.STUDY)
}

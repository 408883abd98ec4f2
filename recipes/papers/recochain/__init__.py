"""RecoChain on prepared data: ablations, the SASRec baseline, report and results."""

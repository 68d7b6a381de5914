"""From folders of DICOM and NIfTI to a superpatch store, through Dask."""

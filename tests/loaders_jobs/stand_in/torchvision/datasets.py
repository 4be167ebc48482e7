"""See the package."""


class VisionDataset: ...


class CIFAR10: ...

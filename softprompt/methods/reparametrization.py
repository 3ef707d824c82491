from flax import nnx


class MLP(nnx.Module):
    pass


class LSTM(nnx.Module):
    pass


class Residual(nnx.Module):
    pass


class LowRank(nnx.Module):
    pass

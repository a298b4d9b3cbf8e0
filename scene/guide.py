"""What guides the fit of a capture to few photographs: their exposures, the cloud of points, coarse before fine.

    guide = Guide(scene, pixels)
    rays_o, rays_d, wanted, view, away = guide.draw(512, generator)
    seen = guide.exposed(rgb, view)                # [3,512], as bright as the photographs are
"""
import torch

from scene.box import sightings


class Exposure(torch.nn.Module):
    """The exposures of V training views, learnt along with a fit.

    Photographs of one walk around a thing differ in exposure. Without a gain and a bias of its own, each is explained
    by a haze in front of its camera. Only the fit uses them; what is rendered has the mean exposure.

    Attributes:
        gain, bias: [3,V], logarithms of the factors on a view's colours, and what is added to them.
    """
    RATE = 1e-2  # of gain and bias

    def __init__(self, views, device):
        super().__init__()
        self.gain, self.bias = (torch.nn.Parameter(torch.zeros(3, views, device=device)) for _ in range(2))

    def param_group(self):
        """The group of gain and bias for Adam."""
        return {"name": "exposure", "params": [self.gain, self.bias], "lr": self.RATE}

    def kept(self):
        """What a checkpoint of the fit holds of it."""
        return {"exposure": self.state_dict()}

    def exposed(self, rgb, view):
        """Colours rgb [3,N] as photographs show them; view: numbers [N], or [1] for all."""
        gain, bias = ((x - x.mean(1, keepdim=True))[:, view] for x in (self.gain, self.bias))
        return rgb * gain.exp() + bias

    def biased(self):
        """What keeps the biases small [], as a gain explains most of an exposure: a term of the loss."""
        return 0.1 * self.bias.square().mean()


class Guide(Exposure):
    """The exposures, the distances of the cloud's points in the pixels of a photographs.Pixels, and the levels.

    Attributes:
        share: of the fit that is done.
        away: [M], distances in half sides of the box of the points that the pixels show, 0 elsewhere; None without
            points.
    """
    SHARE = 0.2  # of the rays drawn, those that meet a point
    WEIGHT, WINDOW = 0.1, 0.1  # of the distances of points, and what they may be off by, as a share of them
    COARSE, MANY = 0.25, 20  # share of the levels that learn from the start; views of which half of a fit opens all

    def __init__(self, scene, pixels):
        device = pixels.pixels.device
        super().__init__(len(scene.train), device)
        self.pixels, self.away, self.share = pixels, None, 0.0
        if scene.points is not None:
            view, column, row, away = (x.to(device) for x in sightings(scene.train, scene.points))
            self.away = torch.zeros(len(pixels.pixels), device=device)
            self.away[pixels.start[view] + row * pixels.width[view] + column] = away / scene.half
            if pixels.used is not None:
                self.away *= torch.zeros_like(self.away).index_fill(0, pixels.used, 1)
            self.known = self.away.nonzero()[:, 0]

    def at(self, share):
        """The guide itself, at a share of the fit from 0."""
        self.share = share
        return self

    def draw(self, count, generator):
        """Random pixels: rays_o, rays_d [3,count], colours [3,count], numbers of the views [count], distances of the
        points there [count], 0 where they are unknown."""
        at = self.pixels.numbers(count, generator)
        if self.away is not None and len(self.known):
            of_points = torch.randint(len(self.known), (int(self.SHARE * count),), generator=generator,
                                      device=at.device)
            at[:len(of_points)] = self.known[of_points]
        rays_o, rays_d, colours, view = self.pixels.look(at)
        return rays_o, rays_d, colours, view, torch.zeros_like(rays_d[0]) if self.away is None else self.away[at]

    def opened(self, levels):
        """Weights [2 levels,1] of the features of a grid: its levels join from coarse to fine, later the fewer views
        there are (Neuralangelo, Li et al., arXiv 2306.03092). None: all are there."""
        count = levels * (self.COARSE + (1 - self.COARSE) * 2 * self.share * max(1, self.gain.shape[1] / self.MANY))
        if count >= levels:
            return None
        return (count - torch.arange(levels, device=self.gain.device)).clamp(0, 1).repeat(2)[:, None]

    def strayed(self, weights, t, ray, opacity, away):
        """What keeps the light of rays to a point of the cloud there [], falling over the fit, and the biases small.

        Linear in the weights, so that a wrong point does no harm (cf. depth-supervised NeRF, Deng et al., arXiv
        2107.02791). weights, t, ray: [N] of the samples; opacity, away: [R] of the rays, in half sides of the box.
        """
        known = away > 0
        off = (t / away.clamp_min(1e-6)[ray]).log().abs().div(self.WINDOW).clamp(max=1)
        stray = (weights * off)[known[ray]].sum() + (1 - opacity)[known].sum()
        return self.WEIGHT * (1 - self.share) * stray / len(away) + self.biased()

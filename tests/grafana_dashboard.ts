// The shape of a dashboard by Grafana's schema, with the options of the panels that this one has. JSON has the values
// of an enum where the schema has the enum.
import type { Dashboard, Panel } from "@grafana/schema";
import type { Options as StatOptions } from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type {
  FieldConfig as TimeSeriesFields, Options as TimeSeriesOptions,
} from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

type Plain<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
type Query = { refId: string; expr: string; legendFormat: string };
type Of<Type, Options, Fields> = Omit<Panel<unknown, Fields>, "type" | "options" | "targets"> & {
  type: Type; options: Partial<Options>; targets: Query[];
};
export type Shape = Plain<Omit<Dashboard, "panels"> & {
  panels: (Of<"stat", StatOptions, {}> | Of<"timeseries", TimeSeriesOptions, TimeSeriesFields>)[];
}>;

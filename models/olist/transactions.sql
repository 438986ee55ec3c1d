-- Olist: one row per order item.
--
-- Data set: "Brazilian E-Commerce Public Dataset by Olist" on Kaggle, nine CSV files. The models read six of them; the
-- reviews, sellers and geolocation are not needed.
--
-- Amount     The price of the item, in Brazilian reais. Each item is one piece.
-- Discounts  Not in the data: vouchers are a way of payment.
-- Shipping   Not included (`freight_value`).
-- Taxes      Included in the price.
-- Refunds    Not in the data. Orders without items have no row.
-- Payment    The method that pays the largest part of an order. An order can have several payments.
-- Status     approved, processing, invoiced, shipped, delivered: completed, since the payment is approved.
--            created: pending. canceled, unavailable: cancelled.
-- Customer   `customer_unique_id`, since an order's `customer_id` is new for each order.
--
-- source olist_order_items_dataset: olist_order_items*
-- columns olist_order_items_dataset: order_id, order_item_id, product_id, seller_id, shipping_limit_date, price
-- source olist_orders_dataset: olist_orders*
-- columns olist_orders_dataset: order_id, customer_id, order_status, order_purchase_timestamp
-- source olist_order_payments_dataset: olist_order_payments*
-- columns olist_order_payments_dataset: order_id, payment_type, payment_value
-- source olist_customers_dataset: olist_customers*
-- columns olist_customers_dataset: customer_id, customer_unique_id, customer_city

WITH methods AS (
    SELECT order_id, payment_type,
        ROW_NUMBER() OVER (PARTITION BY order_id ORDER BY paid DESC, payment_type) AS place
    FROM (
        SELECT order_id, payment_type, SUM(try_cast(payment_value AS DECIMAL(12, 2))) AS paid
        FROM olist_order_payments_dataset
        GROUP BY order_id, payment_type
    )
)
SELECT
    concat(i.order_id, '/', i.order_item_id) AS transaction_id,
    i.order_id,
    CASE WHEN c.customer_unique_id <> '' THEN xxhash64(lower(trim(c.customer_unique_id))) END AS customer_id,
    i.product_id,
    '1' AS quantity,
    i.price AS amount,
    'BRL' AS currency,
    o.order_purchase_timestamp AS timestamp,
    m.payment_type AS payment_method,
    CASE
        WHEN o.order_status IN ('approved', 'processing', 'invoiced', 'shipped', 'delivered') THEN 'completed'
        WHEN o.order_status = 'created' THEN 'pending'
        WHEN o.order_status IN ('canceled', 'unavailable') THEN 'cancelled'
        ELSE o.order_status
    END AS status,
    c.customer_city AS location,
    i._delivery, i._source_file, i._source_row
FROM olist_order_items_dataset i
LEFT JOIN olist_orders_dataset o ON o.order_id = i.order_id
LEFT JOIN olist_customers_dataset c ON c.customer_id = o.customer_id
LEFT JOIN methods m ON m.order_id = i.order_id AND m.place = 1
